"""Samplers: reverse-time integrators. They do not depend on the network, the VAE or the guidance."""

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
"""Maximum number of steps. Published samplers take at most 1,000 to 4,000."""


@dataclass(frozen=True)
class SamplerOutput:
    """Result of a sampler."""

    u: torch.Tensor
    """State at t = 0, (B, k*C, H, W). The image is the first component. The others are at their mean, zero."""
    nfe: torch.Tensor
    """Counted network evaluations of each sample, (B,), int64."""


@dataclass
class SamplerState:
    """Inputs of a step other than u: the model, the noise, and the progress of the trajectory."""

    model: SamplerModel
    threshold: Threshold
    noise: NoiseFn
    times: list[float]
    """The time grid, decreasing from 1 to 0."""
    i: int = 0
    """Index of the current step, which goes from times[i] to times[i + 1]."""
    model_calls: int = 0
    """Number of model calls so far."""
    history: list[tuple[float, torch.Tensor]] = field(default_factory=list)
    """Earlier predictions that a multistep method keeps: (t or log-SNR, prediction), newest last."""

    @property
    def diffusion(self) -> Diffusion:
        return self.model.diffusion

    def predict(self, u: torch.Tensor, t: float) -> Prediction:
        """Call the model and count the call."""
        self.model_calls += 1
        return self.model(u, t, threshold=self.threshold)


class Sampler(ABC):
    """Integrate u from t = 1 (noise) to t = 0 (data) along a time grid. Subclasses implement `step`.

    The last step, to t = 0, is the same for all samplers. It returns the predicted image without added noise, and costs
    one model call.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        steps: int = 50
        """Number of steps, including the last one to t = 0. Range 1 to 10,000. A schedule with discrete times limits it
        to their number."""
        spacing: Spacing = Spacing.uniform
        """Spacing of the times: uniform | quadratic | log_snr | karras. log_snr and karras need k = 1."""
        t_min: float = 0.0
        """Last time before 0 for uniform and quadratic, in [0, 1). With 0 the grid is spread down to 0 itself."""
        sigma_min: float = 0.002
        """sigma/alpha at the last time before 0 for log_snr and karras, above 0."""
        threshold: Threshold = Threshold.clamp
        """none | clamp | dynamic: how to limit the predicted image to [-1, 1] at each step. Latents are never
        limited."""
        temperature: float = 1.0
        """Factor on the initial noise u_1. Values below 1 give less varied but more regular images."""

    needs_mean_denoiser: bool = True
    """Whether the refiner must predict the mean of the images that a state can come from, as an ordinary denoiser does.
    If false, the sampler needs a distilled refiner, which predicts one image."""
    lockstep: bool = True
    """Whether all samples are at the same time after each step. Only then can on_step insert known pixels."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        if not 1 <= config.steps <= MAX_STEPS:
            raise UserError(f"sampler.steps={config.steps}: use 1 to {MAX_STEPS}")
        self.config = config

    def supports(self, diffusion: Diffusion) -> bool:
        """Return whether this sampler can integrate the diffusion's process on its schedule."""
        return True

    @abstractmethod
    def step(self, state: SamplerState, u: torch.Tensor, t: float, s: float) -> torch.Tensor:
        """Return u at time s, given u (B, k*C, H, W) at time t, for 0 < s < t <= 1."""

    @torch.no_grad()
    def sample(
        self, model: SamplerModel, u: torch.Tensor, noise: NoiseFn, on_step: OnStep | None = None
    ) -> SamplerOutput:
        """Integrate from u (B, k*C, H, W) at t = 1 to t = 0.

        `on_step` is called with the start and with the state after each step, and can replace the state.
        """
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
    """Return the names of the samplers in `asked` that support the diffusion.

    If `asked` is empty, consider all samplers, except those that need a distilled refiner.
    """
    names = asked or [name for name in SAMPLERS.names() if SAMPLERS.get(name).needs_mean_denoiser]
    return [name for name in names if SAMPLERS.build({"name": name}, shapes).supports(diffusion)]
