"""The interface between networks and samplers: a sampler integrates a `SamplerModel` and knows nothing else of it."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Protocol

import torch

from dvae.diffusion.kernels import Diffusion, Prediction, Time


class Threshold(Enum):
    """What is done to the predicted image at each step, where it leaves the range of images."""

    none = "none"
    """Nothing."""
    clamp = "clamp"
    """Cut at -1 and 1."""
    dynamic = "dynamic"
    """Cut at the 99.5% quantile of its own absolute values and scaled back to it (Saharia et al. 2022, section 2.3)."""


class SamplerModel(Protocol):
    """What a sampler integrates: a denoiser bound to its condition and guidance, or a closed form in a test."""

    @property
    def diffusion(self) -> Diffusion: ...

    @property
    def nfe_per_call(self) -> int:
        """Network evaluations per call: 2 with classifier-free guidance."""
        ...

    def __call__(self, u: torch.Tensor, t: Time, *, threshold: Threshold = Threshold.none) -> Prediction:
        """Prediction for u (B, k*C, H, W) at one time t, or at a time per image (B,)."""
        ...

    def __getitem__(self, rows: torch.Tensor) -> SamplerModel:
        """The model of some images of its batch, rows (n,) int64: for samplers in which images go their own ways."""
        ...


NoiseFn = Callable[[int], torch.Tensor]
"""noise(i): standard normal noise number i of u's shape; keyed per image, so it does not depend on the batch."""

OnStep = Callable[[int, float, torch.Tensor], torch.Tensor]
"""on_step(i, t, u) -> u: called with each state reached, i = 0 for the start; may replace it (inpainting, previews)."""
