"""What tools/sample.py draws: new images."""

from __future__ import annotations

import numpy as np
import torch

from dvae.inference.generation.generation_settings import SampleConfig
from dvae.inference.generation.task import GenerationTask, side_by_side
from dvae.inference.refine import check_drawing


class Samples(GenerationTask):
    """Images of a seed: [the VAE's sample] [denoised estimates on the way] the refined sample."""

    decide = ("shared", "intermediate")
    settings: SampleConfig

    def __init__(self, settings: SampleConfig, device: str | torch.device | None = None) -> None:
        super().__init__(settings, device)
        self.tiles = (1, self.vae + settings.intermediate + 1)
        check_drawing(self.pipeline, settings.shared, settings.intermediate)

    def draw(self, numbers: range) -> dict[str, np.ndarray]:
        settings = self.settings
        drawn = self.pipeline.generate_batch(
            numbers,
            settings.seed,
            label=settings.label or None,
            guidance=self.guidance,
            shared=settings.shared,
            intermediate=settings.intermediate,
        )
        shown = [drawn.vae] if drawn.vae is not None and self.vae else []
        if drawn.estimates is not None:
            shown += list(drawn.estimates.unbind(1))
        arrays = {"pixels": side_by_side([[*shown, drawn.refined]]), "nfe": drawn.nfe.numpy()}
        return arrays if drawn.label is None else arrays | {"label": drawn.label.numpy()}
