"""Checks before anything is written: a run that cannot work is refused at once, not after an hour."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

from omegaconf import DictConfig

from dvae.config import compose as configuration
from dvae.config import stored
from dvae.config.schema import RunConfig
from dvae.config.stage_names import settings_of
from dvae.data.images import DamagedImage
from dvae.data.labels import check_label
from dvae.data.loading.loader import check_batch
from dvae.data.shards.manifest import Manifest
from dvae.data.shards.remote import is_remote, read_manifest
from dvae.errors import UserError, fold
from dvae.models import bundle_reuse, components
from dvae.registry.core import Shapes
from dvae.registry.distillers.base import DISTILLERS
from dvae.registry.launchers.base import launcher_of
from dvae.registry.sources.base import SOURCES, Item, Source
from dvae.runs.folder import Run
from dvae.toy2d import points

PROBED = 8
"""Images of a source that are tried before a run begins."""
SHARD_SIZE = 10_000
"""Images of the source that make a shard of each split, as dvae.data.building.shard_build takes them by default."""


def check(config: RunConfig, ranks: int = 1) -> tuple[components.RunModels, dict[str, int]]:
    """Refuse what cannot work: shapes, batches, shards, images, missing packages.

    Returns the models, on meta, and the number of images by split (none where the source is endless).
    """
    made = components.build_models_on_meta(config)
    if "encoder" in config.stages and not made.parameters()["encoder"]:
        raise UserError(f"stages: encoder={config.encoder.name} has nothing to train: leave encoder and prior out")
    if "cache" in config.stages and not made.parameters()["encoder"]:
        raise UserError(f"stages: cache keeps what an encoder makes, encoder={config.encoder.name} makes nothing")
    if "joint" in config.stages and (not made.parameters()["encoder"] or made.encoder.adversary() is not None):
        raise UserError(f"stages: joint needs an encoder to train without a discriminator, not {config.encoder.name}")
    apart = {"encoder", "joint", "distil"}.isdisjoint(config.stages)
    if config.encoder_weights and apart and not Run(Path(config.run)).weights("encoder").exists():
        raise UserError(
            f"encoder_weights={config.encoder_weights} is taken over by the stage encoder, which trains nothing then: "
            "add encoder to stages=[...]"
        )
    if "encoder" in config.stages:
        bundle_reuse.adopted_encoder_weights(config, made.encoder)  # refuses weights that do not fit
    for training in (getattr(config, settings_of(stage)) for stage in [*made.parameters(), "joint", "distil"]):
        check_batch(training.batch, ranks, training.micro_batches)
    if "distil" in config.stages:
        DISTILLERS.build(config.distiller, made.denoiser.shapes).check(made.denoiser)
        bundle_reuse.load_teacher(config)  # refuses what is not there, or other networks
    if configuration.uses_stream(config):
        _check_classes(config)
        return made, {}
    counts = images(config)
    smallest = min(counts["train"], config.evaluate.n_reference)
    scored = config.evaluate.every_steps > 0 or ("evaluate" in config.stages and config.evaluate.metrics)
    if scored and smallest < 2 * config.evaluate.kid_subset_size:
        raise UserError(
            f"evaluate.kid_subset_size={config.evaluate.kid_subset_size} needs twice as many real images, there are "
            f"{smallest}: use {smallest // 2} or less, or evaluate.metrics=false"
        )
    if scored:
        importlib.import_module("dvae.evaluation.metrics")  # refuses where its packages are not installed
    return made, counts


def images(config: RunConfig) -> dict[str, int]:
    """Images by split: of the shards where they exist, else of the source, split by the held-out fraction."""
    folder = Path(config.data.shards)
    remote = is_remote(config.data.shards)
    if remote or (folder / "manifest.json").exists() or "shards" not in config.stages:
        if remote:  # its folder here may lie in the run's, which does not exist yet
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
    """Refuse classes that are not those of the endless source: its labels would mean others."""
    known = points.open_source(config).classes
    if config.classes and tuple(config.classes) != known:
        raise UserError(
            f"classes={config.classes}: source={config.source.name} has {', '.join(known)}: name just these"
        )


def _probe(source: Source, name: str) -> list[Item]:
    """The first images that can be read. Raises UserError where none of them can."""
    items, damage = [], ""
    for index in range(min(PROBED, len(source))):
        try:
            items.append(source[index])
        except DamagedImage as error:
            damage = damage or fold(error)
    if items:
        return items
    raise UserError(f"source={name}: none of the first images can be read ({damage}): are these files images?")


def describe(config: DictConfig) -> str:
    """What `dry_run=true` prints: the resolved config, stages, parameter counts and shards."""
    settings = configuration.to_run_config(config)
    launcher = launcher_of(settings.launcher)
    made, counts = check(settings, launcher.ranks)
    splits = sum(count > 0 for count in counts.values())
    shards = splits * math.ceil(sum(counts.values()) / SHARD_SIZE)
    kept = stored.to_yaml(stored.stored(config)).rstrip()
    lines = [kept, "---", f"stages: {' -> '.join(settings.stages)}"]
    for stage, parameters in made.parameters().items():
        training = getattr(settings, f"train_{stage}")
        if stage in settings.stages:
            given = stage == "encoder" and bundle_reuse.adopted_encoder_weights(settings, made.encoder) is not None
            work = "taken over as they are" if given else f"{training.steps} steps of {training.batch} images"
            lines.append(f"{stage}: {parameters / 1e6:.1f}M parameters, {work}")
    if "joint" in settings.stages:
        total = made.parameters()["encoder"] + made.parameters()["refiner"]
        training = settings.train_joint
        lines.append(f"joint: {total / 1e6:.1f}M parameters, {training.steps} steps of {training.batch} images")
    if "distil" in settings.stages:
        training, made_for = settings.train_distil, DISTILLERS.build(settings.distiller, made.denoiser.shapes).rounds
        rounds = " -> ".join(map(str, made_for))
        lines.append(f"distil: for {rounds} steps, {training.steps} steps of {training.batch} images each")
    if counts:
        lines.append(f"images: about {counts['train']} to train on, {counts['heldout']} held out")
        lines.append(f"shards: {shards} in {settings.data.shards}")
    lines += filter(None, [launcher.plan(Path(settings.run), settings.stages)])
    lines.append("dry run: nothing was written")
    return "\n".join(lines)
