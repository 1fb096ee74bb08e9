"""Points of a stream source: the true ones, and those that a pipeline generates, class by class."""

from __future__ import annotations

import torch

from dvae.config.schema import RunConfig
from dvae.inference.inference_core import InferenceCore, ProgressCallback
from dvae.inference.noise import KeyedNoise
from dvae.inference.refine import refine_images
from dvae.registry.core import Shapes
from dvae.registry.sources.base import SOURCES, StreamSource
from dvae.utils import rng


def open_source(config: RunConfig) -> StreamSource:
    """The endless source of a run."""
    source = SOURCES.build(config.source, Shapes(image_size=config.image_size, channels=config.channels))
    assert isinstance(source, StreamSource), config.source.name
    return source


def label_groups(config: RunConfig, source: StreamSource) -> dict[str, int | None]:
    """What is drawn and compared apart: each class by its label, or all mixed where the refiner is told no class."""
    if config.denoiser.condition_label:
        return {name: label for label, name in enumerate(source.classes)}
    return {" + ".join(source.classes): None}


def true_points(source: StreamSource, label: int | None, n: int, seed: int) -> torch.Tensor:
    """n true points (n, d); no seed gives those that a run was trained on."""
    return source.sample(rng.child(seed, "true points"), range(n), label)[0].flatten(1)


def sample_points(
    core: InferenceCore, label: int | None, n: int, seed: int, advance: ProgressCallback | None = None
) -> torch.Tensor:
    """n points (n, d) of a trained run."""
    conditioning = core.sample_conditioning(n, seed, label)
    return refine_images(core, conditioning, KeyedNoise(seed, range(n)), advance=advance)[0].flatten(1)
