"""The job of a run: run the stages of a run folder. Finished stages are skipped, and others are resumed."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from dvae.config.schema import RunConfig
from dvae.errors import UserError
from dvae.registry.launchers.base import launcher_of
from dvae.runs.folder import Run
from dvae.runs.stage_states import StageState, stage_state
from dvae.stages.base import open_stages
from dvae.tracking.report import write_report
from dvae.training.engine.deepspeed_engine import start_distributed
from dvae.training.engine.malloc_options import keep_freed_memory
from dvae.training.resilience import ranks, stopping, watchdog


@dataclass(frozen=True)
class RunJob:
    """Runs the stages of a run folder. It holds only names, so it can be sent to any process."""

    folder: str
    """Path of the run folder."""
    stages: tuple[str, ...] = ()
    """The stages to run. Empty: all stages of the config."""

    def __call__(self) -> None:
        """Run the job. Every rank must call this. Rank 0 holds the lock of the folder, and decides which stages run."""
        run = Run(Path(self.folder))
        start_distributed()
        keep_freed_memory()
        with ranks.translate_peer_loss(), nullcontext() if ranks.rank() else run.held():
            ranks.on_rank_zero(run.tidy)
            config = run.own_config()
            names = ranks.on_rank_zero(stages_to_run, run, config, self.stages)
            stages = [stage for stage in open_stages(config) if stage.name in names]
            stop_request = stopping.start_attempt(config.max_hours)
            with watchdog.watching(launcher_of(config.launcher).config.hang_seconds):
                for number, stage in enumerate(stages):
                    if number:
                        stop_request.raise_between_stages()
                    if ranks.rank() == 0:
                        print(f"dvae: {stage.name} ...", flush=True)
                    if stage.all_ranks:
                        stage.run(run)
                    else:
                        ranks.on_rank_zero(stage.run, run)
                    ranks.on_rank_zero(require_record, run, stage.name)
            ranks.on_rank_zero(finish_job, run, config, bool(stages))
            ranks.leave()


def require_record(run: Run, stage: str) -> None:
    """Raise UserError if a stage ended without a record, which would run again and again."""
    if stage not in run.records():
        raise UserError(f"the stage {stage!r} ended without run.finish({stage!r}, {{...}}): call it at its end")


def finish_job(run: Run, config: RunConfig, has_run: bool) -> None:
    if has_run:
        write_report(run.path)
        print(f"dvae: done; open {run.path / 'report.html'}", flush=True)
    else:
        print(f"dvae: {run.path} is finished ({', '.join(config.stages)}): nothing to do", flush=True)


def stages_to_run(run: Run, config: RunConfig, selected: tuple[str, ...] = ()) -> list[str]:
    """Return the unfinished stages of the config, in their order. If stages are `selected`, others are left out."""
    stages = [stage for stage in open_stages(config) if not selected or stage.name in selected]
    return [stage.name for stage in stages if stage_state(run, stage) is not StageState.finished]
