"""Recording of the images that the network predicts during sampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dvae.diffusion.kernels import Diffusion, Prediction, Time
from dvae.diffusion.sampler_model import SamplerModel, Threshold


class RecordingDenoiser:
    """A SamplerModel that records the first prediction of the clean state in each of the given steps.

    It needs a sampler that moves all images in the same steps (`Sampler.lockstep`). Pass `on_step` to the sampler, so
    that this object knows the current step.

    Args:
        model: The model that makes the predictions.
        steps: The step numbers to record, in increasing order. The first step is number 0.
    """

    def __init__(self, model: SamplerModel, steps: Sequence[int]) -> None:
        self.model, self.steps = model, steps
        self.x0: list[torch.Tensor] = []
        """The recorded predictions (B, C, H, W), one for each step of `steps` that has been taken."""
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
        """Note the current step. This is an OnStep callback that returns the state unchanged."""
        self._step = i
        return u
