"""Checks of a run before anything is written. They find faults that would otherwise end the run much later."""

from __future__ import annotations

import importlib
from pathlib import Path

from dvae.config import compose as configuration
from dvae.config.schema import RunConfig
from dvae.data.images import DamagedImage
from dvae.data.labels import check_label
from dvae.data.loading.loader import check_batch
from dvae.data.shards.manifest import Manifest
from dvae.data.shards.remote import is_remote, read_manifest
from dvae.errors import UserError, fold
from dvae.models import components
from dvae.registry.core import Shapes
from dvae.registry.sources.base import SOURCES, Item, Source
from dvae.stages.base import TrainStage, open_stages
from dvae.stages.encoder import EncoderStage
from dvae.toy2d import points

PROBED = 8
"""Maximum number of images of a source that are read before a run starts."""


def check(config: RunConfig, ranks: int = 1) -> tuple[components.RunModels, dict[str, int]]:
    """Check shapes, batch sizes, shards, images and installed packages.

    Returns the models on the meta device, and the number of images by split (empty if the source is endless). Raises
    UserError for the first fault. `ranks` is the number of ranks.
    """
    made = components.build_models_on_meta(config)
    stages = open_stages(config)
    EncoderStage(config).refuse_unused_weights()
    for stage in stages:
        stage.check(made)
    for training in (config.training(stage.name) for stage in stages if isinstance(stage, TrainStage)):
        check_batch(training.batch, ranks, training.micro_batches)
    if configuration.uses_stream(config):
        _check_classes(config)
        return made, {}
    counts = images(config)
    smallest = min(counts["train"], config.evaluate.n_reference)
    scored = config.evaluate.every_steps > 0 or ("evaluate" in config.stages and config.evaluate.metrics)
    if scored and smallest < 2 * config.evaluate.kid_subset_size:
        raise UserError(
            f"evaluate.kid_subset_size={config.evaluate.kid_subset_size} needs at least twice as many real images, but "
            f"there are {smallest}: use {smallest // 2} or less, or evaluate.metrics=false"
        )
    if scored:
        importlib.import_module("dvae.evaluation.metrics")  # raises an error if its packages are not installed
    return made, counts


def images(config: RunConfig) -> dict[str, int]:
    """Return the number of images by split.

    The shards are counted if they exist. Otherwise the images of the source are counted, and split by
    data.heldout_fraction.
    """
    folder = Path(config.data.shards)
    remote = is_remote(config.data.shards)
    if remote or (folder / "manifest.json").exists() or "shards" not in config.stages:
        if remote:  # read without a local folder: data.download_to may lie in the run folder, which does not exist yet
            text = read_manifest(config.data.shards)
            manifest = Manifest.parse(text, config.data.shards, config.image_size, config.channels)
        else:
            manifest = Manifest.load(folder, config.image_size, config.channels)
        if config.classes:
            check_label(manifest.labels, config.data.label, config.classes)
        return {split: manifest.count(split) for split in ("train", "heldout")}
    source = SOURCES.build(config.source, Shapes(image_size=config.image_size, channels=config.channels))
    probed = _probe(source, config.source.name)
    if config.classes:
        names = {name for item in probed for name in item.labels}
        values = {name: {str(item.labels[name]) for item in probed if name in item.labels} for name in names}
        check_label({name: sorted(seen) for name, seen in values.items()}, config.data.label, config.classes)
    heldout = round(len(source) * config.data.heldout_fraction)
    return {"train": len(source) - heldout, "heldout": heldout}


def _check_classes(config: RunConfig) -> None:
    """Raise UserError if `classes` differs from the classes of the endless source, which it labels by number."""
    known = points.open_source(config).classes
    if config.classes and tuple(config.classes) != known:
        raise UserError(
            f"classes={config.classes}: source={config.source.name} has the classes {', '.join(known)}: use these"
        )


def _probe(source: Source, name: str) -> list[Item]:
    """Read the first images of a source, without damaged ones. Raises UserError if all of them are damaged."""
    items, damage = [], ""
    for index in range(min(PROBED, len(source))):
        try:
            items.append(source[index])
        except DamagedImage as error:
            damage = damage or fold(error)
    if items:
        return items
    raise UserError(f"source={name}: none of the first images can be read ({damage}): are these files images?")
