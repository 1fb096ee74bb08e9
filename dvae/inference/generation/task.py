"""A run, opened to generate what a command was asked for; and the record of what that was."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import asdict
from enum import Enum
from typing import Any, ClassVar

import numpy as np
import torch

from dvae.config import compose
from dvae.diffusion.guidance import Guidance
from dvae.errors import UserError
from dvae.inference import batching, pipeline
from dvae.inference.generation.formats import Tiles
from dvae.inference.generation.generation_settings import GenerationConfig
from dvae.models import bundle

DEFAULT_COUNT = 8
"""Results where no number is asked for, and there might be many."""


class GenerationTask(ABC):
    """The pipeline of a run, set up as a command's settings say. Its class and its settings are picklable.

    A subclass sets `tiles`, and perhaps `images_per_result`; limits the number of results; and generates them. Raises
    UserError where the run has not what the settings name.
    """

    identity_fields: ClassVar[tuple[str, ...]] = ()
    """Names of the settings that identify a request, besides those that all commands have: the bits of result k depend
    on them."""

    def __init__(self, settings: GenerationConfig, device: str | torch.device | None = None) -> None:
        self.settings = settings
        self.pipeline = pipeline.load(settings.run, settings.batch, device)
        compose.refuse_points(self.pipeline.config, settings.run)
        if settings.sampler is not None:
            self.pipeline.use_sampler(settings.sampler)
        self.guidance = Guidance(
            condition=settings.guidance,
            label=settings.label_guidance,
            pca=settings.pca_guidance,
            classifier=settings.classifier_guidance,
        )
        if settings.label:
            self.pipeline.class_number(settings.label)
        self.is_picture = settings.out.lower().endswith(".png")
        """Whether the result is to be looked at, and so shows more than what was drawn."""
        generates = self.pipeline.models.has_generator
        if settings.vae and not generates:
            raise UserError(f"vae=true: run={settings.run} draws nothing before refinement: use vae=false")
        self.vae: bool = generates and self.is_picture if settings.vae is None else settings.vae
        """Whether the VAE's image stands beside each refined one."""
        self.labeled = bool(self.pipeline.config.classes)
        """Whether results have a class; `generate` then returns "label" too."""
        self.images_per_result = 1
        """Refined images of a result."""
        self.tiles: Tiles = (1, 1 + self.vae)
        """Rows and columns of images in the pixels of a result."""
        self.requested = range(settings.first, settings.first + (DEFAULT_COUNT if settings.n is None else settings.n))
        """Numbers of the results."""

    @property
    def results_per_chunk(self) -> int:
        """Results that are generated in a fixed chunk."""
        return batching.results_per_chunk(self.images_per_result)

    @property
    def results_per_call(self) -> int | None:
        """Results that are generated together by batch; None for fixed chunks."""
        batch = self.settings.batch
        return None if batch is None else max(1, batch // self.images_per_result)

    def limit_results(self, total: int, subject: str, default: int | None = None) -> None:
        """Set the number of results that exist; if n is null, all of them, or `default` of them, are requested.

        Raises UserError where more are requested than exist.
        """
        first, n = self.settings.first, self.settings.n
        end = first + n if n is not None else total if default is None else min(total, first + default)
        if end > total or first >= total:
            asked = "" if n is None else f"n={n} "
            raise UserError(f"{asked}first={first}: {subject} {total}, numbered from 0: ask for no more")
        self.requested = range(first, end)

    def request(self) -> dict[str, Any]:
        """What decides the bits of result k, ready for JSON: all but n."""
        names = (
            "seed", "first", "label", "guidance", "label_guidance", "pca_guidance", "classifier_guidance", "batch",
        )  # fmt: skip
        sampler = {f"sampler.{key}": json_value(value) for key, value in asdict(self.pipeline.sampler.config).items()}
        fields = {name: json_value(getattr(self.settings, name)) for name in (*names, *self.identity_fields)}
        return bundle.read_hashes(self.settings.run) | {"vae": self.vae} | fields | sampler

    @abstractmethod
    def generate(self, numbers: range) -> dict[str, np.ndarray]:
        """Generate the results of these numbers: "pixels" (n, H, W, C) uint8, its tiles laid side by side; "nfe" (n,)
        or (n, images), network evaluations of each image of a result; "label" (n,) where the run has classes, -1 for
        none.

        `numbers` is one of `chunk_ranges`. Those beyond the last that exists may be left out at the end.
        """

    def label_json(self, number: int, label: np.ndarray) -> bytes:
        """JSON of a result's class, as beside the images of dvae's own shards."""
        settings = self.pipeline.config
        labels = {settings.label: settings.classes[int(label)]} if label >= 0 else {}
        return json.dumps({"key": f"{number:06d}", "labels": labels}, sort_keys=True).encode()


def json_value(value: Any) -> Any:
    """A setting ready for JSON."""
    return value.name if isinstance(value, Enum) else value


def side_by_side(rows: list[list[torch.Tensor]]) -> np.ndarray:
    """Pixels (n, rows H, columns W, C) of images (n, C, H, W) uint8 for each tile, row by row."""
    tiled = torch.cat([torch.cat(row, 3) for row in rows], 2)
    return tiled.permute(0, 2, 3, 1).contiguous().cpu().numpy()
