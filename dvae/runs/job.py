"""The job: takes a run folder through its stages, each resumed or skipped as its record says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from dvae.config.schema import STAGES, RunConfig
from dvae.registry.launchers.base import launcher_of
from dvae.runs.folder import Run
from dvae.stages import evaluate
from dvae.stages.cache import run_cache_stage
from dvae.stages.classifier import run_classifier_stage
from dvae.stages.distil import run_distil_stage
from dvae.stages.encoder import run_encoder_stage
from dvae.stages.evaluate import run_evaluate_stage
from dvae.stages.joint import run_joint_stage
from dvae.stages.prior import run_prior_stage
from dvae.stages.refiner import run_refiner_stage
from dvae.stages.shards import run_shards_stage
from dvae.tracking.report import write_report
from dvae.training.engine.deepspeed_engine import start_distributed
from dvae.training.engine.malloc_options import keep_freed_memory
from dvae.training.resilience import ranks, stopping, watchdog

RUNNERS: dict[str, Callable[[Run, RunConfig], None]] = {
    "shards": run_shards_stage,
    "encoder": run_encoder_stage,
    "joint": run_joint_stage,
    "prior": run_prior_stage,
    "cache": run_cache_stage,
    "refiner": run_refiner_stage,
    "classifier": run_classifier_stage,
    "distil": run_distil_stage,
    "evaluate": run_evaluate_stage,
}
"""What runs each stage. Their order is that of STAGES."""
RANK_ZERO_ONLY = ("shards", "prior", "cache", "evaluate")
"""Stages that rank 0 runs alone while the other ranks wait. All ranks take part in the others, which train."""


@dataclass(frozen=True)
class RunJob:
    """Runs the stages of a folder's config.yaml. It holds nothing but the folder, so it can be sent to any process."""

    folder: str
    stages: tuple[str, ...] = ()
    """The stages of the config that are run; empty: all."""

    def __call__(self) -> None:
        """Run the job on every rank. Rank 0 holds the folder and decides which stages are run."""
        run = Run(Path(self.folder))
        start_distributed()
        keep_freed_memory()
        with ranks.translate_peer_loss(), nullcontext() if ranks.rank() else run.held():
            ranks.on_rank_zero(run.tidy)
            config = run.own_config()
            stages = ranks.on_rank_zero(stages_to_run, run, config, self.stages)
            stop_request = stopping.start_attempt(config.max_hours)
            with watchdog.watching(launcher_of(config.launcher).config.hang_seconds):
                for number, stage in enumerate(stages):
                    if number:
                        stop_request.raise_between_stages()
                    if stage in RANK_ZERO_ONLY:
                        ranks.on_rank_zero(run_stage, stage, run, config)
                    else:
                        run_stage(stage, run, config)
            ranks.on_rank_zero(finish_job, run, config, bool(stages))
            ranks.leave()


def run_stage(stage: str, run: Run, config: RunConfig) -> None:
    if ranks.rank() == 0:
        print(f"dvae: {stage} ...", flush=True)
    RUNNERS[stage](run, config)


def finish_job(run: Run, config: RunConfig, has_run: bool) -> None:
    if has_run:
        write_report(run.path)
        print(f"dvae: done; open {run.path / 'report.html'}", flush=True)
    else:
        print(f"dvae: {run.path} is finished ({', '.join(config.stages)}): nothing to do", flush=True)


def stages_to_run(run: Run, config: RunConfig, selected: tuple[str, ...] = ()) -> list[str]:
    """The unfinished stages of the config in their order, or, if some are `selected`, those among them."""
    stages = [stage for stage in STAGES if stage in config.stages and (not selected or stage in selected)]
    return [stage for stage in stages if not is_finished(run, stage, config)]


def is_finished(run: Run, stage: str, config: RunConfig) -> bool:
    """Whether a stage need not be run again. Evaluation is repeated if its settings have changed."""
    record = run.records().get(stage)
    if stage == "evaluate" and record is not None:
        return evaluate.is_up_to_date(record, config)
    return record is not None
