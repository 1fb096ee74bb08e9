"""The stage shards: build the run's images into shards, unless they are there."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from dvae.config.schema import RunConfig
from dvae.data.building.shard_build import build, build_part
from dvae.data.shards.manifest import FILE, TRAIN, Manifest
from dvae.data.shards.remote import is_remote
from dvae.runs.folder import Run
from dvae.tracking.console import CountedProgress
from dvae.training.batches import open_shards


def run_shards_stage(run: Run, config: RunConfig) -> None:
    began = time.perf_counter()
    folder = Path(config.data.shards)
    if is_remote(config.data.shards):
        manifest = open_shards(config, TRAIN).manifest
    elif (folder / FILE).exists():
        manifest = Manifest.load(folder, config.image_size, config.channels)
    else:
        manifest = build_with_progress(config, folder)
    counts = {split: manifest.count(split) for split in ("train", "heldout")}
    run.finish("shards", {"seconds": time.perf_counter() - began, **counts})


def run_shards_part(folder: Path, part: int, parts: int) -> None:
    """Build part number `part` of `parts` of a run's shards; the stage publishes them once all are built."""
    config = Run(folder).own_config()
    with CountedProgress(f"shards, part {part + 1} of {parts}") as progress:
        out = config.data.shards
        build_part(config.source, out=out, part=part, parts=parts, progress=progress, **shard_settings(config))


def build_with_progress(config: RunConfig, folder: Path) -> Manifest:
    with CountedProgress("shards") as progress:
        return build(config.source, out=folder, progress=progress, **shard_settings(config))


def shard_settings(config: RunConfig) -> dict[str, Any]:
    """The settings of a run's shards, as arguments of dvae.data.building.shard_build."""
    return {
        "size": config.image_size,
        "heldout_fraction": config.data.heldout_fraction,
        "channels": config.channels,
        "workers": config.data.workers,
        "max_bad_fraction": config.data.max_bad_fraction,
    }
