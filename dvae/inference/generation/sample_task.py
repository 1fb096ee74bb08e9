"""The generation task of tools/sample.py: new images."""

from __future__ import annotations

import numpy as np
import torch

from dvae.inference.generation.generation_settings import SampleConfig
from dvae.inference.generation.task import GenerationTask, side_by_side
from dvae.inference.refine import check_generation, generate_batch


class SampleTask(GenerationTask):
    """Generate the images of a seed.

    The tiles of a result, from left to right:
    - the VAE's sample, if `vae` is set;
    - `intermediate` denoised estimates from evenly spaced sampler steps;
    - the refined sample.
    """

    identity_fields = ("shared", "intermediate")
    settings: SampleConfig

    def __init__(self, settings: SampleConfig, device: str | torch.device | None = None) -> None:
        super().__init__(settings, device)
        self.tiles = (1, self.vae + settings.intermediate + 1)
        check_generation(self.pipeline, settings.shared, settings.intermediate)

    def generate(self, numbers: range) -> dict[str, np.ndarray]:
        settings = self.settings
        images = generate_batch(
            self.pipeline,
            numbers,
            settings.seed,
            label=settings.label or None,
            guidance=self.guidance,
            shared=settings.shared,
            intermediate=settings.intermediate,
        )
        tiles = [images.vae] if images.vae is not None and self.vae else []
        if images.estimates is not None:
            tiles += list(images.estimates.unbind(1))
        arrays = {"pixels": side_by_side([[*tiles, images.refined]]), "nfe": images.nfe.numpy()}
        return arrays if images.label is None else arrays | {"label": images.label.numpy()}
