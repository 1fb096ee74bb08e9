"""The state of a training besides its engines, and how both are saved to checkpoints and restored."""

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
    """All that a run must remember besides the engines: resuming restores it bit for bit. Each rank has its own."""

    step: int = 0
    """Steps taken."""
    seconds: float = 0.0
    """Time spent in training, over all attempts."""
    sums: MetricSums = field(default_factory=dict)
    """Metrics of this rank since the last row of metrics."""
    window_seconds: float = 0.0
    """Time since the last row of metrics."""
    skipped: int = 0
    """Steps of this stage that were skipped because a gradient was not finite."""

    def add_metrics(self, metrics: MetricSums) -> None:
        self.sums = add_metric_sums([self.sums, metrics])

    def pop_means(self) -> dict[str, float]:
        """Means since the last row of metrics. This begins a new row."""
        means = metric_means(self.sums)
        self.sums, self.window_seconds = {}, 0.0
        return means


def save_checkpoint(engines: dict[str, Engine], checkpoints: Checkpoints, state: TrainState) -> None:
    """Begin a checkpoint of every engine and the state. It is written while training goes on."""
    snapshots = {name: engine.snapshot() for name, engine in engines.items()}

    def write(folder: Path) -> list[Path]:
        written = []
        for name, snapshot in snapshots.items():
            (folder / name).mkdir(exist_ok=True)
            written.append(folder / name / f"rank-{ranks.rank():05d}.safetensors")
            snapshot.write(written[-1])
        return written

    first, *others = ranks.all_gather(state.sums)
    checkpoints.save(state.step, asdict(state) | {"sums": first, "others": others}, write)


def resume(name: str, engines: dict[str, Engine], checkpoints: Checkpoints, tracker: Tracker) -> TrainState:
    """Load the newest good checkpoint of stage `name` into the engines, and return its state.

    Metrics beyond the checkpoint are removed. It may come from another number of ranks and another ZeRO stage.
    """
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
    """This rank's share of the sums of the ranks that saved them.

    If the number of ranks is the same, each rank gets its own sums. Otherwise rank 0 gets all of them.
    """
    if len(saved) == ranks.world_size():
        return saved[ranks.rank()]
    return {} if ranks.rank() else add_metric_sums(saved)
