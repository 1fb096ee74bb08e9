"""The probability-flow ODE with adaptive steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dvae.diffusion.kernels import Diffusion
from dvae.diffusion.probability_flow import MIN_SQRT_CLOCK, flow_velocity, sqrt_clock
from dvae.diffusion.rk45 import integrate
from dvae.diffusion.sampler_model import NoiseFn, OnStep, SamplerModel, Threshold
from dvae.errors import UserError
from dvae.registry.core import Shapes
from dvae.registry.samplers.base import SAMPLERS, Sampler, SamplerOutput, SamplerState


@SAMPLERS.register("ode")
class ProbabilityFlow(Sampler):
    """Solve the probability-flow ODE by adaptive Runge-Kutta steps, for any process (Song et al. 2021, section 4.3).

    Each sample has its own steps (rk45.py), so its result and its number of evaluations do not depend on the batch. The
    tolerance determines the steps, so `steps`, `spacing` and `sigma_min` have no effect. The last step, from t_min to
    0, takes the predicted image as in all samplers. It costs one more model call.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Sampler.Config):
        tolerance: float = 1e-5
        """Tolerated error of each step, relative and absolute, above 0."""
        t_min: float = 1e-3
        """Last time before 0, in (0, 1). If sqrt(B) is below 1e-3 there, the time at which it is 1e-3 is used instead.
        Values below 1e-3 take more evaluations without a visible gain."""
        threshold: Threshold = Threshold.none
        """none | clamp | dynamic: how to limit the predicted image to [-1, 1]. clamp and dynamic make the flow less
        smooth, so it takes many more evaluations."""

    config: Config
    lockstep = False

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        if not config.tolerance > 0.0:
            raise UserError(f"sampler.tolerance={config.tolerance}: must be above 0; 1e-5 is usual")
        if not 0.0 < config.t_min < 1.0:
            raise UserError(f"sampler.t_min={config.t_min}: must be above 0 and below 1; 1e-3 is usual")

    def supports(self, diffusion: Diffusion) -> bool:
        return not diffusion.schedule.zero_terminal_snr

    def step(self, state: SamplerState, u: torch.Tensor, t: float, s: float) -> torch.Tensor:
        raise AssertionError("sampler ode has no common step, because each sample has its own times: call `sample`")

    @torch.no_grad()
    def sample(
        self, model: SamplerModel, u: torch.Tensor, noise: NoiseFn, on_step: OnStep | None = None
    ) -> SamplerOutput:
        """Integrate from u (B, k*C, H, W) at t = 1 to t = 0. `on_step` is called with these two states only."""
        config, diffusion = self.config, model.diffusion
        u = config.temperature * u
        if on_step is not None:
            u = on_step(0, 1.0, u)
        flow, last = flow_velocity(model, config.threshold), config.t_min
        if sqrt_clock(diffusion, last) < MIN_SQRT_CLOCK:
            last = diffusion.schedule.inverse(torch.tensor(MIN_SQRT_CLOCK**2, dtype=torch.float64, device="cpu")).item()
        end = integrate(flow, u, sqrt_clock(diffusion, 1.0), sqrt_clock(diffusion, last), config.tolerance)
        u = diffusion.initial_state(model(end.y, last, threshold=config.threshold).x0)
        if on_step is not None:
            u = on_step(1, 0.0, u)
        return SamplerOutput(u, (end.evaluations + 1) * model.nfe_per_call)
