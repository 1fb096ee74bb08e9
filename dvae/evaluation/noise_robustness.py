"""Samples refined from noisy reconstructions: how far the refiner mends what it was never trained on."""

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
    """Samples with noise on their x_hat."""

    noise: float = 0.0
    """Standard deviation; x_hat is in [-1, 1]."""


class NoisySampleTask(SampleTask):
    """As SampleTask, with x_hat + noise * eps in the place of x_hat, eps ~ N(0, 1) keyed by seed and image.

    It is not clamped, and takes the place of x_hat wherever that goes: as condition, and with denoiser.center != none
    as what the refiner's image is added to.
    """

    settings: NoisyConfig

    def __init__(self, settings: NoisyConfig, device: str | None = None) -> None:
        super().__init__(settings, device)
        if not self.pipeline.models.has_generator:
            raise UserError(f"noise=: run={settings.run} has no x_hat that noise could be added to")

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
