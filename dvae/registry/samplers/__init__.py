"""Samplers: reverse-time integrators. They know no network, VAE or guidance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from dvae.registry.core import ComponentConfig, Registry, Shapes

if TYPE_CHECKING:
    from dvae.diffusion import Diffusion, Prediction


class Model(Protocol):
    """What a sampler integrates: a denoiser bound to its condition and guidance, or a closed form in a test."""

    @property
    def diffusion(self) -> Diffusion: ...

    def __call__(self, u: torch.Tensor, t: float, *, clip: bool = False) -> Prediction:
        """Prediction for u (B, k*C, H, W) at one time t; `clip` keeps x0 within the image range [-1, 1]."""
        ...


Noise = Callable[[int], torch.Tensor]
"""noise(i): standard normal noise of u's shape for step i; keyed per image, so it does not depend on the batch."""

OnStep = Callable[[int, float, torch.Tensor], torch.Tensor]
"""on_step(i, t, u) -> u: called with each state reached, i = 0 for the start; may replace it (inpainting, previews)."""


@dataclass(frozen=True)
class Sampled:
    """The end of a trajectory."""

    u: torch.Tensor
    """State at t = 0, (B, k*C, H, W)."""
    nfe: int
    """Network evaluations per sample, as counted."""


class Sampler(ABC):
    """Takes u from t = 1 (noise) to t = 0 (data)."""

    Config: type[ComponentConfig]

    @abstractmethod
    def __init__(self, config: ComponentConfig, io: Shapes) -> None: ...

    @abstractmethod
    def supports(self, diffusion: Diffusion) -> bool:
        """Whether this sampler integrates that diffusion's process."""

    @abstractmethod
    def sample(self, model: Model, u: torch.Tensor, noise: Noise, on_step: OnStep | None = None) -> Sampled:
        """Integrate from u at t = 1 to t = 0."""


SAMPLERS: Registry[Sampler] = Registry("sampler", __name__)
