"""Points of an endless source: the true ones, and those that a pipeline draws, class by class."""

from __future__ import annotations

import torch

from dvae.config.schema import RunConfig
from dvae.inference.noise import Noise
from dvae.inference.pipeline import Advance, Pipeline
from dvae.registry.core import Shapes
from dvae.registry.sources.base import SOURCES, StreamSource
from dvae.utils import rng


def open_source(config: RunConfig) -> StreamSource:
    """The endless source of a run."""
    source = SOURCES.build(config.source, Shapes(image_size=config.image_size, channels=config.channels))
    assert isinstance(source, StreamSource), config.source.name
    return source


def groups(config: RunConfig, source: StreamSource) -> dict[str, int | None]:
    """What is drawn and compared apart: each class by its label, or all mixed where the refiner is told no class."""
    if config.denoiser.condition_label:
        return {name: label for label, name in enumerate(source.classes)}
    return {" + ".join(source.classes): None}


def true(source: StreamSource, label: int | None, n: int, seed: int) -> torch.Tensor:
    """n true points (n, d); no seed gives those that a run was trained on."""
    return source.draw(rng.child(seed, "true points"), range(n), label)[0].flatten(1)


def drawn(pipeline: Pipeline, label: int | None, n: int, seed: int, advance: Advance | None = None) -> torch.Tensor:
    """n points (n, d) of a trained run."""
    return pipeline.refined(pipeline.draw(n, seed, label), Noise(seed, range(n)), advance=advance)[0].flatten(1)
