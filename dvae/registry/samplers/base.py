"""Samplers: reverse-time integrators. They know no network, VAE or guidance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from dvae.diffusion.kernels import Diffusion, Prediction
from dvae.diffusion.sampler_model import NoiseFn, OnStep, SamplerModel, Threshold
from dvae.diffusion.time_grid import Spacing, time_grid
from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Registry, Shapes

MAX_STEPS = 10_000
"""Steps of a sampler; published ones take 1,000 to 4,000 at most."""


@dataclass(frozen=True)
class SamplerOutput:
    """The end of a trajectory."""

    u: torch.Tensor
    """State at t = 0, (B, k*C, H, W): the image first, the other components at their mean, zero."""
    nfe: torch.Tensor
    """Network evaluations of each sample, (B,), int64, as counted."""


@dataclass
class SamplerState:
    """One trajectory under way: what a step may use besides the state."""

    model: SamplerModel
    threshold: Threshold
    noise: NoiseFn
    times: list[float]
    """The grid, from 1 down to 0."""
    i: int = 0
    """Number of the step: from times[i] to times[i + 1]."""
    model_calls: int = 0
    """Calls of the model so far."""
    history: list[tuple[float, torch.Tensor]] = field(default_factory=list)
    """What a multistep method keeps of the steps behind it: (t or log-SNR, prediction), newest last."""

    @property
    def diffusion(self) -> Diffusion:
        return self.model.diffusion

    def predict(self, u: torch.Tensor, t: float) -> Prediction:
        """The model's prediction; counted."""
        self.model_calls += 1
        return self.model(u, t, threshold=self.threshold)


class Sampler(ABC):
    """Takes u from t = 1 (noise) to t = 0 (data) along a grid of times. A method is its `step`.

    The last step, to t = 0, is alike for all: the predicted image, without noise, at the cost of one evaluation.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        steps: int = 50
        """Steps of the grid, the last to t = 0 included; at most the number of the schedule's discrete times."""
        spacing: Spacing = Spacing.uniform
        """uniform | quadratic | log_snr | karras; the last two need k = 1."""
        t_min: float = 0.0
        """uniform, quadratic: the last time before 0; with 0 the grid is spread down to 0 itself."""
        sigma_min: float = 0.002
        """log_snr, karras: sigma/alpha at the last time before 0."""
        threshold: Threshold = Threshold.clamp
        """none | clamp | dynamic: keeps the predicted image within its range at each step; latents have no range."""
        temperature: float = 1.0
        """Factor on the starting noise u_1; below 1 trades variety for regularity."""

    needs_mean_denoiser: bool = True
    """Whether it integrates a denoiser, which sees the mean of the images that a state may come from; one that does not
    wants a refiner that sees one image."""
    lockstep: bool = True
    """Whether all samples stand at the same time after each step, so that on_step can put in known pixels."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        if not 1 <= config.steps <= MAX_STEPS:
            raise UserError(f"sampler.steps={config.steps}: use 1 to {MAX_STEPS}")
        self.config = config

    def supports(self, diffusion: Diffusion) -> bool:
        """Whether this sampler integrates that process on that schedule."""
        return True

    @abstractmethod
    def step(self, state: SamplerState, u: torch.Tensor, t: float, s: float) -> torch.Tensor:
        """u at s from u at t, 0 < s < t <= 1."""

    @torch.no_grad()
    def sample(
        self, model: SamplerModel, u: torch.Tensor, noise: NoiseFn, on_step: OnStep | None = None
    ) -> SamplerOutput:
        """Integrate from u at t = 1 to t = 0."""
        config = self.config
        times = time_grid(model.diffusion.schedule, config.steps, config.spacing, config.t_min, config.sigma_min)
        state = SamplerState(model, config.threshold, noise, times)
        u = config.temperature * u
        if on_step is not None:
            u = on_step(0, times[0], u)
        for state.i, (t, s) in enumerate(pairwise(times)):
            u = self.step(state, u, t, s) if s > 0.0 else model.diffusion.initial_state(state.predict(u, t).x0)
            if on_step is not None:
                u = on_step(state.i + 1, s, u)
        return SamplerOutput(u, torch.full((len(u),), state.model_calls * model.nfe_per_call))


SAMPLERS: Registry[Sampler] = Registry("sampler", __package__, Sampler)


def compatible_samplers(diffusion: Diffusion, shapes: Shapes, asked: Sequence[str] = ()) -> list[str]:
    """Names of those samplers asked for (none: all but those that want a distilled refiner) which integrate it."""
    names = asked or [name for name in SAMPLERS.names() if SAMPLERS.get(name).needs_mean_denoiser]
    return [name for name in names if SAMPLERS.build({"name": name}, shapes).supports(diffusion)]
