"""The job: takes a run folder through its stages, each resumed or skipped as its record says."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dvae.config.compose import uses_stream
from dvae.config.model_config import model_config
from dvae.config.schema import RunConfig
from dvae.data.building.shard_build import build as build_shards
from dvae.data.building.shard_build import build_part
from dvae.data.shards.manifest import FILE as manifest_file
from dvae.data.shards.manifest import TRAIN, Manifest
from dvae.data.shards.remote import is_remote
from dvae.inference.pipeline import Pipeline
from dvae.registry.launchers.base import launcher_of
from dvae.runs.folder import Run
from dvae.stages.cache import write_cache_part
from dvae.stages.distil import distil_stage
from dvae.stages.evaluate import evaluate
from dvae.stages.joint import joint_stage
from dvae.stages.online_scores import scorer
from dvae.stages.work import (
    PARTS,
    cache_stage,
    classifier_stage,
    encoder_stage,
    load_models,
    open_shards,
    prior_stage,
    refiner_stage,
)
from dvae.toy2d.point_scores import evaluate_points
from dvae.tracking import figures
from dvae.tracking.console import CountedProgress
from dvae.tracking.report import write_report
from dvae.tracking.tracker import Tracker
from dvae.training.engine.deepspeed_engine import start_distributed
from dvae.training.engine.memory import keep_freed_memory
from dvae.training.resilience import ranks, stopping, watchdog
from dvae.utils import atomic_files


@dataclass(frozen=True)
class Job:
    """Runs what a folder's config.yaml says. Holds nothing but the folder, so that it can be sent anywhere."""

    folder: str
    stages: tuple[str, ...] = ()
    """Those of the config's stages that are run; empty: all."""

    def __call__(self) -> None:
        """On every rank; rank 0 holds the folder and decides what there is to do."""
        run = Run(Path(self.folder))
        start_distributed()
        keep_freed_memory()
        with ranks.translate_peer_loss(), nullcontext() if ranks.rank() else run.held():
            ranks.on_rank_zero(run.tidy)
            config = run.own_config()
            stages = ranks.on_rank_zero(unfinished, run, config, self.stages)
            asking = stopping.begin(config.max_hours)
            with watchdog.watching(launcher_of(config.launcher).config.hang_seconds):
                for number, stage in enumerate(stages):
                    if number:
                        asking.between_stages()
                    if stage in RANK_ZERO_ONLY:
                        ranks.on_rank_zero(work, stage, run, config)
                    else:
                        work(stage, run, config)
            ranks.on_rank_zero(conclude, run, config, bool(stages))
            ranks.leave()


def work(stage: str, run: Run, config: RunConfig) -> None:
    if ranks.rank() == 0:
        print(f"dvae: {stage} ...", flush=True)
    RUNNERS[stage](run, config)


def conclude(run: Run, config: RunConfig, took_part: bool) -> None:
    if took_part:
        write_report(run.path)
        print(f"dvae: done; open {run.path / 'report.html'}", flush=True)
    else:
        print(f"dvae: {run.path} is finished ({', '.join(config.stages)}): nothing to do", flush=True)


def unfinished(run: Run, config: RunConfig, among: tuple[str, ...] = ()) -> list[str]:
    """The stages that there are to run, in their order; where some are named, among these."""
    wanted = [stage for stage in RUNNERS if stage in config.stages and (not among or stage in among)]
    return [stage for stage in wanted if not finished(run, stage, config)]


def finished(run: Run, stage: str, config: RunConfig) -> bool:
    """Whether a stage need not be run again; evaluation is repeated where its settings have changed."""
    record = run.records().get(stage)
    if stage == "evaluate" and record is not None:
        return bool(record["settings"] == evaluate_settings(config))
    return record is not None


def evaluate_settings(config: RunConfig) -> str:
    return f"{replace(config.evaluate, every_steps=0)} {config.sampler}"


def shards_stage(run: Run, config: RunConfig) -> None:
    began = time.perf_counter()
    folder = Path(config.data.shards)
    if is_remote(config.data.shards):
        manifest = open_shards(config, TRAIN).manifest
    elif (folder / manifest_file).exists():
        manifest = Manifest.load(folder, config.image_size, config.channels)
    else:
        manifest = build_with_progress(config, folder)
    counts = {split: manifest.count(split) for split in ("train", "heldout")}
    run.finish("shards", {"seconds": time.perf_counter() - began, **counts})


def build_with_progress(config: RunConfig, folder: Path) -> Manifest:
    with CountedProgress("shards") as progress:
        return build_shards(config.source, out=folder, progress=progress, **shards_of(config))


def shards_of(config: RunConfig) -> dict[str, Any]:
    """What a run's shards are, and how they are built, in the words of dvae.data.building.shard_build."""
    return {
        "size": config.image_size,
        "heldout_fraction": config.data.heldout_fraction,
        "channels": config.channels,
        "workers": config.data.workers,
        "max_bad_fraction": config.data.max_bad_fraction,
    }


def build_part_of_shards(folder: Path, part: int, parts: int) -> None:
    """Build part number `part` of `parts` of a run's shards; the stage `shards` publishes them once all are built."""
    config = Run(folder).own_config()
    with CountedProgress(f"shards, part {part + 1} of {parts}") as progress:
        out = config.data.shards
        build_part(config.source, out=out, part=part, parts=parts, progress=progress, **shards_of(config))


def write_part_of_cache(folder: Path, part: int, parts: int) -> None:
    """Make part number `part` of `parts` of a run's cache; the stage `cache` publishes it once all are made."""
    run = Run(folder)
    config = run.own_config()
    write_cache_part(run, config, load_models(run, config, "encoder"), part, parts)


def scored_refiner_stage(run: Run, config: RunConfig) -> None:
    refiner_stage(run, config, scorer(run, config, partial(open_shards, config)))


def evaluate_stage(run: Run, config: RunConfig) -> None:
    if not run.has_weights("classifier"):
        config = replace(config, classifier=None)  # not trained yet: all else works without it
    made = load_models(run, config, *PARTS)
    for module in made.trained_parts().values():
        module.eval().requires_grad_(False)
    summary: dict[str, Any] = {"recipe": config.recipe, "stages": run.records()}
    began = time.perf_counter()
    pipeline = Pipeline(model_config(config), made, config.evaluate.batch)
    if uses_stream(config):
        summary["evaluation"] = evaluate_points(run, config, pipeline)
    else:
        summary["evaluation"] = evaluate(
            run, config, pipeline, open_shards(config, "train"), open_shards(config, "heldout")
        )
    record = {"seconds": time.perf_counter() - began, "settings": evaluate_settings(config)}
    summary["stages"] = summary["stages"] | {"evaluate": record}
    found = figures.of_evaluation(summary["evaluation"])
    summary["figures"] = figures.of_training(run.path) | found
    with Tracker(run.path, config.tracking.wandb, "evaluate") as tracked:
        tracked.summarize(found)
        pictures = [path for path in (run.path / "samples.png", run.path / "reconstructions.png") if path.exists()]
        tracked.results(found, pictures, run.bundle)
    atomic_files.write_json(run.summary, summary)
    run.finish("evaluate", record)


RUNNERS: dict[str, Callable[[Run, RunConfig], None]] = {
    "shards": shards_stage,
    "encoder": encoder_stage,
    "joint": joint_stage,
    "prior": prior_stage,
    "cache": cache_stage,
    "refiner": scored_refiner_stage,
    "classifier": classifier_stage,
    "distil": distil_stage,
    "evaluate": evaluate_stage,
}
RANK_ZERO_ONLY = ("shards", "prior", "cache", "evaluate")
"""Stages that rank 0 does alone, while the others wait; the rest is training, in which all take part."""
