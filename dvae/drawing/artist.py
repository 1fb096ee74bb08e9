"""A run, opened to draw what was asked for; and the record of what that was."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from typing import Any

import numpy as np
import torch

from dvae import bundle, config, pipeline
from dvae.errors import UserError
from dvae.guidance import Guidance
from dvae.settings import SampleConfig


class Artist:
    """The pipeline of a run with everything set as the words of tools/sample.py say.

    Raises UserError where the run has not what they name.
    """

    def __init__(self, settings: SampleConfig, device: str | torch.device | None = None) -> None:
        self.settings = settings
        self.pipeline = pipeline.load(settings.run, settings.batch_size, device)
        if config.endless(self.pipeline.config):
            raise UserError(f"run={settings.run} draws points, not images: use python tools/gallery.py runs=...")
        if isinstance(settings.sampler, dict) and "name" not in settings.sampler:
            self.pipeline.use_sampler(**settings.sampler)
        elif settings.sampler is not None:
            self.pipeline.use_sampler(settings.sampler)
        self.label = self.pipeline.class_number(settings.label) if settings.label else None
        self.guidance = Guidance(
            condition=settings.guidance, label=settings.label_guidance, classifier=settings.classifier_guidance
        )
        generates, grid = self.pipeline.models.generates, settings.out.lower().endswith(".png")
        if settings.vae and not generates:
            raise UserError(f"vae=true: run={settings.run} draws nothing before refinement: use vae=false")
        self.vae: bool = generates and grid if settings.vae is None else settings.vae
        """Whether the VAE's sample stands at the left of each refined one."""

    def request(self) -> dict[str, Any]:
        """What decides the bits of image k, ready for JSON: all but n."""
        hashes = json.loads((pipeline.bundle_of(self.settings.run) / bundle.ABOUT).read_text("utf-8"))["sha256"]
        names = ("seed", "first", "label", "guidance", "label_guidance", "classifier_guidance", "batch_size")
        sampler = {
            f"sampler.{key}": value.name if isinstance(value, Enum) else value
            for key, value in asdict(self.pipeline.sampler.config).items()
        }
        asked = {name: getattr(self.settings, name) for name in names}
        return {"weights": hashes[bundle.WEIGHTS], "config": hashes[bundle.CONFIG], "vae": self.vae} | asked | sampler

    def draw(self, numbers: range) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (n, H, W, C) uint8, or (n, H, 2W, C) with the VAE's sample at the left, and evaluations (n,)."""
        drawn = self.pipeline.draw_together(numbers, self.settings.seed, label=self.label, guidance=self.guidance)
        shown = drawn.refined if drawn.vae is None or not self.vae else torch.cat([drawn.vae, drawn.refined], 3)
        return shown.permute(0, 2, 3, 1).contiguous().numpy(), drawn.nfe.numpy()
