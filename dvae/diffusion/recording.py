"""Denoised estimates on a sampler's way: the images that the network predicts as it goes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dvae.diffusion.kernels import Diffusion, Prediction, Time
from dvae.diffusion.sampler_model import SamplerModel, Threshold


class RecordingDenoiser:
    """A model whose predictions of the clean state are kept: the first of each of the wanted steps.

    Goes with samplers whose images move in the same steps: `on_step` tells it where they stand.
    """

    def __init__(self, model: SamplerModel, steps: Sequence[int]) -> None:
        self.model, self.steps = model, steps
        self.x0: list[torch.Tensor] = []
        """(B, C, H, W) of each of the wanted steps that are behind."""
        self._step = 0

    @property
    def diffusion(self) -> Diffusion:
        return self.model.diffusion

    @property
    def nfe_per_call(self) -> int:
        return self.model.nfe_per_call

    def __getitem__(self, rows: torch.Tensor) -> SamplerModel:
        return self.model[rows]

    def __call__(self, u: torch.Tensor, t: Time, *, threshold: Threshold = Threshold.none) -> Prediction:
        prediction = self.model(u, t, threshold=threshold)
        if len(self.x0) < len(self.steps) and self._step == self.steps[len(self.x0)]:
            self.x0.append(prediction.x0)
        return prediction

    def on_step(self, i: int, t: float, u: torch.Tensor) -> torch.Tensor:
        """An on_step that replaces nothing."""
        self._step = i
        return u
