"""What a stage measured, to wherever it is wanted: metrics.jsonl always, W&B where it is switched on."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any

from dvae.tracking.metrics_log import MetricsLog
from dvae.tracking.wandb_run import WandbRun
from dvae.tracking.wandb_settings import WandbConfig, WandbMode


class Tracker:
    """The records of one stage of a run. Call `rewind` once before the first `log`, and `close` at the end."""

    def __init__(self, run_folder: Path, wandb: WandbConfig, stage: str) -> None:
        """Raises UserError where W&B is wanted and cannot be had."""
        self.stage = stage
        self.metrics = MetricsLog(run_folder / "metrics.jsonl")
        self.wandb = None if wandb.mode is WandbMode.disabled else WandbRun(run_folder, wandb, stage)

    def rewind(self, stage: str, step: int) -> None:
        """Training of `stage` (re)starts after `step`: drop its later rows, and send W&B those that it lacks."""
        self.metrics.rewind(stage, step)
        if self.wandb:
            self.wandb.catch_up(self.metrics.rows())

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Record flat figures at `step`. "time" is added: seconds since 1970."""
        row = {"time": round(time.time(), 3), **metrics}
        self.metrics.append({"stage": self.stage, "step": step, **row})
        if self.wandb:
            self.wandb.log(self.stage, step, row)

    def image(self, name: str, path: Path, step: int) -> None:
        """Show W&B a PNG of the run folder, after the row of its step."""
        if self.wandb:
            self.wandb.image(self.stage, step, name, path)

    def summarize(self, figures: dict[str, float | None]) -> None:
        """Enter figures of the whole run, by full name, in W&B's summary; summary.json is the caller's."""
        if self.wandb:
            self.wandb.summarize(figures)

    def results(self, figures: dict[str, float | None], pictures: list[Path], bundle: Path) -> None:
        """Show W&B what an evaluation found, and the rows of metrics that it lacks."""
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
    """Records nothing: that of the ranks beside the first."""

    def __init__(self) -> None:
        self.wandb = None

    def rewind(self, stage: str, step: int) -> None: ...

    def log(self, step: int, metrics: dict[str, Any]) -> None: ...

    def image(self, name: str, path: Path, step: int) -> None: ...
