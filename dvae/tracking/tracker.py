"""Record the metrics of a stage in metrics.jsonl, and in W&B if it is enabled."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any

from dvae.tracking.metrics_log import MetricsLog
from dvae.tracking.wandb_run import WandbRun
from dvae.tracking.wandb_settings import WandbConfig, WandbMode


class Tracker:
    """Records the metrics of one stage. Call `rewind` once before the first `log`, and `close` at the end."""

    def __init__(self, run_folder: Path, wandb: WandbConfig, stage: str) -> None:
        """Open the records of a stage. Raises UserError if W&B is enabled and rejects the run (see `WandbRun`)."""
        self.stage = stage
        self.metrics = MetricsLog(run_folder / "metrics.jsonl")
        self.wandb = None if wandb.mode is WandbMode.disabled else WandbRun(run_folder, wandb, stage)

    def rewind(self, stage: str, step: int) -> None:
        """Prepare for training of `stage` to start or resume after `step`.

        Later rows of the stage are dropped, and W&B receives the rows that it lacks.
        """
        self.metrics.rewind(stage, step)
        if self.wandb:
            self.wandb.catch_up(self.metrics.rows())

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Record metrics at `step`. "time", in seconds since 1970, is added unless `metrics` has it."""
        row = {"time": round(time.time(), 3), **metrics}
        self.metrics.append({"stage": self.stage, "step": step, **row})
        if self.wandb:
            self.wandb.log(self.stage, step, row)

    def image(self, name: str, path: Path, step: int) -> None:
        """Send a PNG file of the run folder to W&B. Call this after `log` for the same step."""
        if self.wandb:
            self.wandb.image(self.stage, step, name, path)

    def summarize(self, figures: dict[str, float | None]) -> None:
        """Write metrics of the whole run, by full name, to W&B's summary. The caller writes summary.json."""
        if self.wandb:
            self.wandb.summarize(figures)

    def results(self, figures: dict[str, float | None], pictures: list[Path], bundle: Path) -> None:
        """Send the results of an evaluation to W&B, after the rows of metrics that it lacks."""
        if self.wandb:
            self.wandb.catch_up(self.metrics.rows())
            self.wandb.results(figures, pictures, bundle)

    def close(self) -> None:
        """Wait until everything is written or uploaded."""
        if self.wandb:
            self.wandb.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class NoTracker(Tracker):
    """A tracker that records nothing, for all ranks except the first."""

    def __init__(self) -> None:
        self.wandb = None

    def rewind(self, stage: str, step: int) -> None: ...

    def log(self, step: int, metrics: dict[str, Any]) -> None: ...

    def image(self, name: str, path: Path, step: int) -> None: ...
