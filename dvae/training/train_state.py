"""Training state outside the engines, and functions that save and restore both."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from dvae.tracking.tracker import Tracker
from dvae.training.engine.deepspeed_engine import Engine
from dvae.training.metric_sums import MetricSums, add_metric_sums, metric_means
from dvae.training.resilience import ranks
from dvae.training.resilience.checkpoint import Checkpoints


@dataclass
class TrainState:
    """State of a stage's training besides the engines. Each rank has its own. Resuming restores it bit for bit."""

    step: int = 0
    """Number of steps taken, including skipped ones."""
    seconds: float = 0.0
    """Seconds spent in training steps, over all attempts."""
    sums: MetricSums = field(default_factory=dict)
    """Metrics of this rank since the last row of metrics.jsonl."""
    window_seconds: float = 0.0
    """Seconds spent in training steps since the last row of metrics.jsonl."""
    skipped: int = 0
    """Number of steps that were skipped because a gradient was not finite."""

    def add_metrics(self, metrics: MetricSums) -> None:
        """Add sums and counts of metrics to the next row of metrics."""
        self.sums = add_metric_sums([self.sums, metrics])

    def pop_means(self) -> dict[str, float]:
        """Return the means since the last row of metrics, and start a new row."""
        means = metric_means(self.sums)
        self.sums, self.window_seconds = {}, 0.0
        return means


def save_checkpoint(engines: dict[str, Engine], checkpoints: Checkpoints, state: TrainState) -> None:
    """Start a checkpoint of all engines and the state. It is written in the background while training continues."""
    # Copies, because the next steps change the originals while the thread writes.
    snapshots = {name: engine.snapshot() for name, engine in engines.items()}

    def write(folder: Path) -> list[Path]:
        written = []
        for name, snapshot in snapshots.items():
            (folder / name).mkdir(exist_ok=True)
            written.append(folder / name / f"rank-{ranks.rank():05d}.safetensors")
            snapshot.write(written[-1])
        return written

    # Rank 0 writes its own state for all ranks, with the metric sums of each.
    first, *others = ranks.all_gather(state.sums)
    checkpoints.save(state.step, asdict(state) | {"sums": first, "others": others}, write)


def resume(name: str, engines: dict[str, Engine], checkpoints: Checkpoints, tracker: Tracker) -> TrainState:
    """Load the newest intact checkpoint of stage `name` into the engines, and return its state.

    Another number of ranks, or another ZeRO stage, may have written it. Without a checkpoint the state is new.
    Checkpoints and metrics after the returned step are removed, because the run is about to repeat these steps.
    """
    # Rank 0 decides for all ranks, so that they cannot load different checkpoints.
    newest = ranks.on_rank_zero(checkpoints.newest)
    state = TrainState()
    if newest:
        folder, saved = newest
        sums = [saved["sums"], *saved.pop("others", [])]
        for module, engine in engines.items():
            engine.load(folder / module)
        state = TrainState(**saved | {"sums": restore_metric_sums(sums)})
    ranks.on_rank_zero(checkpoints.drop_after, state.step)
    ranks.on_rank_zero(tracker.rewind, name, state.step)
    return state


def restore_metric_sums(saved: list[MetricSums]) -> MetricSums:
    """This rank's metric sums, from the sums that all ranks saved.

    If the number of ranks has not changed, each rank gets its own sums. Otherwise rank 0 gets the total, and the others
    get none: a row of metrics adds up the ranks anyway.
    """
    if len(saved) == ranks.world_size():
        return saved[ranks.rank()]
    return {} if ranks.rank() else add_metric_sums(saved)
