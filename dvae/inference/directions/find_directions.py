"""Find the directions of a run from its training images, and store them in its bundle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dvae.data.shards.manifest import TRAIN
from dvae.errors import UserError, suggest
from dvae.inference import pipeline as pipelines
from dvae.inference.directions import direction_files, finders
from dvae.inference.directions.attributes import LabeledAttributes
from dvae.inference.directions.direction import Direction, DirectionMethod
from dvae.inference.directions.direction_settings import DirectionsConfig
from dvae.inference.encode_posteriors import encode_posteriors
from dvae.inference.run_images import open_split
from dvae.models import bundle
from dvae.tracking.console import Progress


@dataclass(frozen=True)
class FoundDirections:
    """New directions, and the attributes and values that were skipped."""

    directions: list[Direction]
    skipped: dict[str, str]
    """Reason for each skipped attribute, "NAME", or value, "NAME=VALUE"."""
    images: int
    """Number of images that the directions were found from."""


def find(settings: DirectionsConfig) -> FoundDirections:
    """Find directions with each method of `settings.find` and store them in the run's bundle.

    Raises UserError if the run has no encoder, or if its images or their labels are not available.
    """
    for name in ("components", "n_train", "jacobians", "batch"):
        if getattr(settings, name) < 1:
            raise UserError(f"{name}={getattr(settings, name)}: use 1 or more")
    pipeline = load_with_encoder(settings)
    shards = open_split(settings.run, pipeline.config, TRAIN, settings.shards)
    indices = np.arange(min(settings.n_train, len(shards)))
    attributes = LabeledAttributes.from_shards(shards) if DirectionMethod.labels in settings.find else None
    names = select_names(settings.labels, attributes.names, "labels") if attributes else []
    z = encode_posteriors(pipeline, shards, len(indices), "encode").mean
    directions: list[Direction] = []
    skipped: dict[str, str] = {}
    for method in settings.find:
        if method is DirectionMethod.labels:
            assert attributes is not None
            # an image that cannot be read is substituted by another, so take the labels of the substitute
            codes = attributes.codes(shards)[torch.from_numpy(shards.substituted(indices))]
            new, skipped = finders.from_labels(z, codes, attributes, names)
            skipped = attributes.skipped | skipped
        elif method is DirectionMethod.pca:
            new = finders.pca(z, settings.components)
        else:
            new = jacobian_directions(pipeline, z[: settings.jacobians], settings.components)
        directions += new
    direction_files.save(settings.run, directions)
    return FoundDirections(directions, skipped, len(z))


def jacobian_directions(pipeline: pipelines.Pipeline, z: torch.Tensor, components: int) -> list[Direction]:
    """Find directions from the decoder's Jacobian at latents z (N, *latent)."""
    with Progress("jacobian", len(z)) as progress:
        return finders.jacobian(
            pipeline.models.encoder.decode, z.to(pipeline.device), components,
            lambda: progress.update(progress.step + 1, 1),
        )  # fmt: skip


def load_with_encoder(settings: DirectionsConfig) -> pipelines.Pipeline:
    """Load the pipeline of the run. Raises UserError if the run has no encoder, and therefore no latent space."""
    pipeline = pipelines.load(settings.run, settings.batch)
    if pipeline.config.draws_points or "encoder" not in pipeline.models.trained_parts():
        raise UserError(f"run={settings.run} has no encoder, so no latent to find directions of: use a run with one")
    return pipeline


def select_names(names: list[str], known: list[str], setting: str) -> list[str]:
    """Return `names`, or all `known` names if `names` is empty. Raises UserError if a name is not known."""
    for name in names:
        if name not in known:
            raise UserError(f"{setting}={name}: there is none of this name: {suggest(name, known)}")
    return names or known


def list_directions(settings: DirectionsConfig) -> list[Direction]:
    """Return the directions that are stored for the run."""
    return list(direction_files.load_all(bundle.find_bundle(settings.run)).values())
