"""True points of a stream source and points that a pipeline generates, by class."""

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
    """Return the stream source of a run. It generates training points without end."""
    source = SOURCES.build(config.source, Shapes(image_size=config.image_size, channels=config.channels))
    assert isinstance(source, StreamSource), config.source.name
    return source


def label_groups(config: RunConfig, source: StreamSource) -> dict[str, int | None]:
    """Return the groups of points that are drawn and compared separately, as names and labels.

    If the refiner is conditioned on the label, each class is a group. Otherwise all classes are one group, with the
    label None.
    """
    if config.denoiser.condition_label:
        return {name: label for label, name in enumerate(source.classes)}
    return {" + ".join(source.classes): None}


def true_points(source: StreamSource, label: int | None, n: int, seed: int) -> torch.Tensor:
    """Return n true points (n, d). They differ from the training points of a run for every seed."""
    return source.sample(rng.child(seed, "true points"), range(n), label)[0].flatten(1)


def sample_points(
    core: InferenceCore, label: int | None, n: int, seed: int, advance: ProgressCallback | None = None
) -> torch.Tensor:
    """Generate n points (n, d) with a trained run. `advance` is called to report progress."""
    conditioning = core.sample_conditioning(n, seed, label)
    return refine_images(core, conditioning, KeyedNoise(seed, range(n)), advance=advance)[0].flatten(1)
