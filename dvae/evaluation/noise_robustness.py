"""Draw samples that are refined from a noisy x_hat, to measure how robust the refiner is to inputs unlike training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dvae.data.images import to_uint8
from dvae.errors import UserError
from dvae.inference.generation.generation_settings import SampleConfig
from dvae.inference.generation.sample_task import SampleTask
from dvae.inference.generation.task import side_by_side
from dvae.inference.noise import KeyedNoise
from dvae.inference.refine import refine_images
from dvae.utils import rng


@dataclass(kw_only=True, slots=True)
class NoisyConfig(SampleConfig):
    """Settings of samples with noise on x_hat."""

    noise: float = 0.0
    """Standard deviation of Gaussian noise to add to x_hat, whose range is [-1, 1]."""


class NoisySampleTask(SampleTask):
    """Draws samples as SampleTask does, but replaces x_hat by x_hat + noise * eps, with eps ~ N(0, 1).

    eps is keyed by the seed and the image number. The sum is not clamped. It replaces x_hat in all its uses: as
    condition, and, if denoiser.center is not none, as the image to which the refiner's output is added.
    """

    settings: NoisyConfig

    def __init__(self, settings: NoisyConfig, device: str | None = None) -> None:
        super().__init__(settings, device)
        if not self.pipeline.models.has_generator:
            raise UserError(f"noise=: run={settings.run} has no x_hat to add noise to: leave noise out")

    def request(self) -> dict[str, Any]:
        return super().request() | {"noise": self.settings.noise}

    def generate(self, numbers: range) -> dict[str, np.ndarray]:
        pipeline, settings = self.pipeline, self.settings
        conditioning = pipeline.conditioning_of(numbers, settings.seed)
        x_hat = conditioning.x_hat
        eps = rng.normal(settings.seed, "noise on x_hat", numbers, x_hat.shape[1:]).to(pipeline.device)
        noisy = replace(conditioning, x_hat=x_hat + settings.noise * eps)
        refined, nfe = refine_images(pipeline, noisy, KeyedNoise(settings.seed, numbers), guidance=self.guidance)
        arrays = {"pixels": side_by_side([[to_uint8(refined)]]), "nfe": nfe.numpy()}
        return arrays if conditioning.label is None else arrays | {"label": conditioning.label.cpu().numpy()}
