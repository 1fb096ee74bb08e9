"""Base class of the generation tasks: it loads a run, generates results by number, and records the request."""

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
"""Number of results if `n` is null and the command could generate many."""


class GenerationTask(ABC):
    """Load the pipeline of a run and generate results as a command's settings say.

    A subclass sets `tiles` and, if a result holds several refined images, `images_per_result`. It may call
    `limit_results`, and it implements `generate`. The class and its settings must be picklable because worker
    processes build the task from them.

    Raises UserError if the run does not have a class, a generator or a sampler that the settings name.
    """

    identity_fields: ClassVar[tuple[str, ...]] = ()
    """Names of the settings that identify a request, in addition to the settings that all commands share. The bits of
    result k depend on them."""

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
        """Whether the result is one picture for a viewer. It then also shows the inputs and the VAE's images."""
        generates = self.pipeline.models.has_generator
        if settings.vae and not generates:
            raise UserError(f"vae=true: run={settings.run} draws nothing before refinement: use vae=false")
        self.vae: bool = generates and self.is_picture if settings.vae is None else settings.vae
        """Whether the VAE's image is put beside each refined image."""
        self.labeled = bool(self.pipeline.config.classes)
        """Whether results have a class. `generate` then also returns "label"."""
        self.images_per_result = 1
        """Number of refined images in a result."""
        self.tiles: Tiles = (1, 1 + self.vae)
        """Rows and columns of images in a result."""
        self.requested = range(settings.first, settings.first + (DEFAULT_COUNT if settings.n is None else settings.n))
        """Numbers of the requested results."""

    @property
    def results_per_chunk(self) -> int:
        """Number of results in a fixed chunk."""
        return batching.results_per_chunk(self.images_per_result)

    @property
    def results_per_call(self) -> int | None:
        """Number of results per call if `batch` is set, at least 1. None selects fixed chunks."""
        batch = self.settings.batch
        return None if batch is None else max(1, batch // self.images_per_result)

    def limit_results(self, total: int, subject: str, default: int | None = None) -> None:
        """Limit the request to the `total` results that exist.

        If `n` is null, the request covers all results from `first` on, or at most `default` of them. `subject` begins
        the error message, for example "images=FOLDER holds".

        Raises UserError if the request goes beyond the last result.
        """
        first, n = self.settings.first, self.settings.n
        end = first + n if n is not None else total if default is None else min(total, first + default)
        if end > total or first >= total:
            asked = "" if n is None else f"n={n} "
            raise UserError(f"{asked}first={first}: {subject} {total}, numbered from 0: ask for no more")
        self.requested = range(first, end)

    def request(self) -> dict[str, Any]:
        """Return everything that decides the bits of result k, as JSON values.

        `n` is not in it: more results do not change result k.
        """
        names = (
            "seed", "first", "label", "guidance", "label_guidance", "pca_guidance", "classifier_guidance", "batch",
        )  # fmt: skip
        sampler = {f"sampler.{key}": json_value(value) for key, value in asdict(self.pipeline.sampler.config).items()}
        fields = {name: json_value(getattr(self.settings, name)) for name in (*names, *self.identity_fields)}
        return bundle.read_hashes(self.settings.run) | {"vae": self.vae} | fields | sampler

    @abstractmethod
    def generate(self, numbers: range) -> dict[str, np.ndarray]:
        """Generate the results with these numbers.

        `numbers` is one of the ranges of `chunk_ranges`. If it goes beyond the last result that exists, the arrays may
        be shorter.

        Returns these arrays by name:
        - "pixels": (n, H, W, C) uint8, with the tiles of a result side by side;
        - "nfe": (n,) or (n, images_per_result), the network evaluations of each image;
        - "label": (n,), only if the run has classes; -1 for no class.
        """

    def label_json(self, number: int, label: np.ndarray) -> bytes:
        """Return a result's class as JSON, in the format of dvae's own shards."""
        settings = self.pipeline.config
        labels = {settings.label: settings.classes[int(label)]} if label >= 0 else {}
        return json.dumps({"key": f"{number:06d}", "labels": labels}, sort_keys=True).encode()


def json_value(value: Any) -> Any:
    """Convert a setting to a JSON value. An enum member becomes its name."""
    return value.name if isinstance(value, Enum) else value


def side_by_side(rows: list[list[torch.Tensor]]) -> np.ndarray:
    """Lay tiles out in rows and columns.

    `rows` holds the images of each tile, (n, C, H, W) uint8. Returns (n, rows * H, columns * W, C) uint8.
    """
    tiled = torch.cat([torch.cat(row, 3) for row in rows], 2)
    return tiled.permute(0, 2, 3, 1).contiguous().cpu().numpy()
