"""Checks before anything is written: a run that cannot work is refused at once, not after an hour."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

from omegaconf import DictConfig

from dvae import config as configuration
from dvae import models
from dvae.config import RunConfig
from dvae.data.images import DamagedImage
from dvae.data.loader import check_batch
from dvae.data.manifest import Manifest
from dvae.errors import UserError, one_line
from dvae.registry import SOURCES, Shapes
from dvae.registry.sources import Source

PROBED = 8
"""Images of a source that are tried before a run begins."""
SHARD_SIZE = 10_000
"""Images per shard, as dvae.data.build makes them by default."""


def check(config: RunConfig, ranks: int = 1) -> tuple[models.Models, dict[str, int]]:
    """Refuse what cannot work: shapes, batches, shards, images, missing packages.

    Returns the models, on meta, and the number of images by split.
    """
    made = models.on_meta(config)
    for training in (config.train_encoder, config.train_refiner):
        check_batch(training.batch, ranks, training.micro_batches)
    counts = images(config)
    smallest = min(counts["train"], config.evaluate.reference)
    if "evaluate" in config.stages and config.evaluate.metrics and smallest < 2 * config.evaluate.kid_subset_size:
        raise UserError(
            f"evaluate.kid_subset_size={config.evaluate.kid_subset_size} needs twice as many real images, there are "
            f"{smallest}: use {smallest // 2} or less, or evaluate.metrics=false"
        )
    if "evaluate" in config.stages and config.evaluate.metrics:
        importlib.import_module("dvae.evaluation.metrics")  # refuses where its packages are not installed
    return made, counts


def images(config: RunConfig) -> dict[str, int]:
    """Images by split: of the shards where they exist, else of the source, split by the held-out fraction."""
    folder = Path(config.data.shards)
    if (folder / "manifest.json").exists() or "shards" not in config.stages:
        manifest = Manifest.load(folder, image_size=config.image_size, channels=config.channels)
        return {split: manifest.count(split) for split in ("train", "heldout")}
    source = SOURCES.build(config.source, Shapes(image_size=config.image_size, channels=config.channels))
    _probe(source, config.source.name)
    heldout = round(len(source) * config.data.heldout)
    return {"train": len(source) - heldout, "heldout": heldout}


def _probe(source: Source, name: str) -> None:
    """Raise UserError where none of the first images can be read."""
    damage = ""
    for index in range(min(PROBED, len(source))):
        try:
            source[index]
        except DamagedImage as error:
            damage = damage or one_line(error)
        else:
            return
    raise UserError(f"source={name}: none of the first images can be read ({damage}): are these files images?")


def describe(config: DictConfig) -> str:
    """What `dry_run=true` prints: the resolved config, stages, parameter counts and shards."""
    settings = configuration.typed(config)
    made, counts = check(settings)
    shards = sum(math.ceil(count / SHARD_SIZE) for count in counts.values())
    lines = [configuration.to_yaml(config).rstrip(), "---", f"stages: {' -> '.join(settings.stages)}"]
    for stage, training in (("encoder", settings.train_encoder), ("refiner", settings.train_refiner)):
        millions = made.parameters()[stage] / 1e6
        lines.append(f"{stage}: {millions:.1f}M parameters, {training.steps} steps of {training.batch} images")
    lines.append(f"images: about {counts['train']} to train on, {counts['heldout']} held out")
    lines.append(f"shards: {shards} of {SHARD_SIZE} images in {settings.data.shards}")
    lines.append("dry run: nothing was written")
    return "\n".join(lines)
