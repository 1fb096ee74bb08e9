"""The stage shards: build shards of the run's images, unless they exist."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvae.config.schema import RunConfig
from dvae.data.building.shard_build import build, build_part
from dvae.data.shards.manifest import FILE, TRAIN, Manifest
from dvae.data.shards.remote import is_remote
from dvae.registry.stages.base import STAGES, StageConfig
from dvae.runs.folder import Run
from dvae.stages.base import Stage
from dvae.tracking.console import CountedProgress
from dvae.training.batches import open_shards


@STAGES.register("shards")
class ShardsStage(Stage):
    """Builds shards of the run's images, unless they exist."""

    @dataclass(kw_only=True, slots=True)
    class Config(StageConfig):
        """The stage shards adds no settings."""

    before = ("encoder",)
    own_job, needs_gpus = True, False
    in_parts = True

    def run(self, run: Run) -> None:
        began, config = time.perf_counter(), self.config
        folder = Path(config.data.shards)
        if is_remote(config.data.shards):
            manifest = open_shards(config, TRAIN).manifest
        elif (folder / FILE).exists():
            manifest = Manifest.load(folder, config.image_size, config.channels)
        else:
            manifest = build_with_progress(config, folder)
        counts = {split: manifest.count(split) for split in ("train", "heldout")}
        run.finish(self.name, {"seconds": time.perf_counter() - began, **counts})

    def run_part(self, run: Run, part: int, parts: int) -> None:
        config = self.config
        with CountedProgress(f"shards, part {part + 1} of {parts}") as progress:
            out = config.data.shards
            build_part(config.source, out=out, part=part, parts=parts, progress=progress, **shard_settings(config))


def build_with_progress(config: RunConfig, folder: Path) -> Manifest:
    with CountedProgress("shards") as progress:
        return build(config.source, out=folder, progress=progress, **shard_settings(config))


def shard_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings of a run's shards as arguments of `build` and `build_part`."""
    return {
        "size": config.image_size,
        "heldout_fraction": config.data.heldout_fraction,
        "channels": config.channels,
        "workers": config.data.workers,
        "max_bad_fraction": config.data.max_bad_fraction,
    }
