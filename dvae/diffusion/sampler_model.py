"""The interface between networks and samplers. A sampler uses only the methods of `SamplerModel`."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Protocol

import torch

from dvae.diffusion.kernels import Diffusion, Prediction, Time


class Threshold(Enum):
    """How to limit the predicted image to [-1, 1] at each step."""

    none = "none"
    """Do not limit it."""
    clamp = "clamp"
    """Clamp pixel values to [-1, 1]."""
    dynamic = "dynamic"
    """Clamp to [-q, q] and divide by q. q is the 99.5% quantile of the image's absolute pixel values, or 1 if the
    quantile is below 1 (Saharia et al. 2022, section 2.3)."""


class SamplerModel(Protocol):
    """The model that a sampler integrates: a denoiser with its condition and guidance, or a closed form in a test."""

    @property
    def diffusion(self) -> Diffusion: ...

    @property
    def nfe_per_call(self) -> int:
        """Network evaluations (NFE) per call, for example 2 with classifier-free guidance."""
        ...

    def __call__(self, u: torch.Tensor, t: Time, *, threshold: Threshold = Threshold.none) -> Prediction:
        """Return the prediction for u (B, k*C, H, W) at one time t, or at one time per image, (B,)."""
        ...

    def __getitem__(self, rows: torch.Tensor) -> SamplerModel:
        """Return the model of the images `rows` (n,) int64 of the batch.

        Samplers that give each image its own steps use it.
        """
        ...


NoiseFn = Callable[[int], torch.Tensor]
"""noise(i) returns the standard normal noise number i, in the shape of u. An image's noise does not depend on the rest
of the batch."""

OnStep = Callable[[int, float, torch.Tensor], torch.Tensor]
"""on_step(i, t, u) -> u is called with the start (i = 0) and with the state after each step i. The sampler continues
with the returned state, so the callback can replace it (inpainting, previews)."""
