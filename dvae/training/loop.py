"""The training loop: one for every stage, on one process as on many."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dvae.data.loading.loader import Batch, Batches
from dvae.errors import Stopped
from dvae.stages.losses import Stage, StepOutput
from dvae.tracking.console import Progress
from dvae.tracking.tracker import Tracker
from dvae.training.engine.deepspeed_engine import Engine, learning_rate
from dvae.training.engine.snapshots import Snapshots
from dvae.training.resilience import nonfinite, ranks, stopping, watchdog
from dvae.training.resilience.checkpoint import Checkpoints
from dvae.utils import rng

Preview = Callable[[int, dict[str, torch.Tensor]], Path]
"""preview(step, averaged weights of the stage) draws a picture of what has been learned so far, and says where it lies;
on rank 0 alone."""

Score = Callable[[dict[str, torch.Tensor]], dict[str, float]]
"""score(averaged weights of the stage): figures of what they draw, for the row of metrics; on rank 0 alone."""


@dataclass(frozen=True)
class TrainHooks:
    """How what has been learned so far is looked at while a stage trains."""

    preview: Preview | None = None
    """Every preview_every steps."""
    score: Score | None = None
    score_every: int = 0
    """Steps between scores (0: none)."""


@dataclass
class State:
    """All that a run must remember besides the engines: resuming restores it bit for bit. Each rank has its own."""

    step: int = 0
    """Steps taken."""
    seconds: float = 0.0
    """Time spent in training, over all attempts."""
    sums: dict[str, list[float]] = field(default_factory=dict)
    """Figures of this rank since the last row of metrics: name -> [sum, count]."""
    window_seconds: float = 0.0
    """Time since the last row of metrics."""
    skipped: int = 0
    """Steps of this stage that were left out because they were not finite."""

    def add(self, metrics: dict[str, tuple[float, float]]) -> None:
        sums = defaultdict(lambda: [0.0, 0.0], self.sums)
        for name, (total, count) in metrics.items():
            sums[name] = [sums[name][0] + total, sums[name][1] + count]
        self.sums = dict(sums)

    def row(self) -> dict[str, float]:
        """Means since the last row, which starts a new one."""
        means = {name: total / count for name, (total, count) in self.sums.items() if count}
        self.sums, self.window_seconds = {}, 0.0
        return means


def train(
    stage: Stage,
    data: Batches,
    checkpoints: Checkpoints,
    tracker: Tracker,
    looks: TrainHooks,
    run: Path,
) -> tuple[dict[str, dict[str, torch.Tensor]], State]:
    """Train `stage` to its last step, from the newest good checkpoint if there is one. Every rank takes part.

    Returns the averaged weights of each module, and the final state. Raises Stopped after saving where a signal or the
    time limit asked for it, MachineError where more steps were not finite than may be.
    """
    config = stage.config
    engines = {name: Engine(module, stage.settings(name)) for name, module in stage.modules().items()}
    state = resume(stage.name, engines, checkpoints, tracker)
    snapshots = Snapshots(run / "snapshots" / stage.name, stage.settings(stage.name))
    ranks.on_rank_zero(snapshots.drop_after, state.step)
    progress = Progress(stage.name, config.steps, state.step, quiet=ranks.rank() > 0)
    asking = stopping.current()
    with progress, asking.on_signals(), checkpoints:
        while state.step < config.steps:
            began = time.perf_counter()
            watchdog.beat(stage.name, state.step + 1, "data")
            batches = data.step(state.step * config.batch)
            take_step(stage, engines, batches, state, run)
            elapsed = time.perf_counter() - began
            state.seconds += elapsed
            state.window_seconds += elapsed
            watchdog.beat(stage.name, state.step, "end")
            if looks.score and looks.score_every and state.step % looks.score_every == 0:
                watchdog.rest(stage.name, state.step, "scores")
                state.add(scored(looks.score, engines[stage.name].averaged()))
            log(stage, state, tracker, progress)
            checkpoints.check()
            why = asking.agreed()
            watchdog.rest(stage.name, state.step, "preview or save")
            if looks.preview and config.preview_every and state.step % config.preview_every == 0:
                show(looks.preview, state.step, engines[stage.name].averaged(), tracker)
            snapshots.take(state.step, engines[stage.name])
            if state.step % config.save_every == 0 or state.step == config.steps or why:
                save(engines, checkpoints, state)
            if why and state.step < config.steps:
                said = f"stopped at {stage.name} step {state.step} ({why}), saved: the same command again resumes"
                raise Stopped(said, why)
    averaged = {name: engine.averaged() for name, engine in engines.items()}
    for engine in engines.values():
        engine.close()
    return averaged, state


def take_step(stage: Stage, engines: dict[str, Engine], batches: list[Batch], state: State, run: Path) -> None:
    """One optimizer step of every module over this rank's micro-batches; advances the state.

    All modules take the step or none does. Raises MachineError where it was left out and none more may be.
    """
    number = state.step + 1
    trained = {name: engine for name, engine in engines.items() if stage.trains(name, number)}
    before = nonfinite.Buffers(trained) if stage.config.nonfinite_skips else None
    figures = backward(stage, engines, batches, number)
    watchdog.beat(stage.name, number, "step")
    finite = {name: engine.finite() for name, engine in trained.items()}  # of each, since all ranks take part in it
    kept = all(finite.values())
    if not kept:
        watchdog.rest(stage.name, number, "replay bundle")
        state.skipped += 1
        nonfinite.skip_step(stage, trained, batches, figures, number, state.skipped, run)
    for engine in trained.values():
        engine.step(number, kept)
    if before and not kept:
        before.restore()
    if kept:
        for part in figures:
            state.add(part)
        for name, engine in trained.items():
            state.add({f"grad_norm_{name}" if len(engines) > 1 else "grad_norm": (engine.grad_norm, 1.0)})
    state.step = number


def backward(stage: Stage, engines: dict[str, Engine], batches: list[Batch], number: int) -> list[nonfinite.Figures]:
    """The gradients of step `number` of every module over this rank's micro-batches; returns the figures of each."""
    figures = []
    for name, engine in engines.items():
        if not stage.trains(name, number):
            continue
        for part, batch in enumerate(batches):
            seed_dropout(stage.seed, number, part)
            watchdog.beat(stage.name, number, "forward")
            out: StepOutput = stage.loss(name, engines, batch)
            watchdog.beat(stage.name, number, "backward")
            engine.backward(out.loss)
            figures.append(out.metrics)
            if part + 1 < len(batches):
                engine.step(number)  # only ends the micro-batch
    return figures


def seed_dropout(seed: int, step: int, part: int) -> None:
    """nn.Dropout draws from torch's own generator, so that is keyed by hand, by the micro-batch in its step."""
    number = part * ranks.world_size() + ranks.rank()
    torch.manual_seed(int(rng.generator(seed, f"dropout 0 {number}", step).integers(2**62)))


def log(stage: Stage, state: State, tracker: Tracker, progress: Progress) -> None:
    """A row of metrics every log_every steps, and at the end: means over all ranks."""
    config = stage.config
    recent = {"loss": state.sums["loss"][0] / state.sums["loss"][1]} if "loss" in state.sums else {}
    progress.update(state.step, config.batch, recent)
    if state.step % config.log_every == 0 or state.step == config.steps:
        steps = state.step % config.log_every or config.log_every
        speed = steps * config.batch / state.window_seconds
        state.sums = ranks.total(ranks.all_gather(state.sums))
        row: dict[str, Any] = state.row() | {"lr": learning_rate(config, state.step), "seconds": state.seconds}
        row |= {"skipped": state.skipped} if state.skipped else {}
        tracker.log(state.step, row | {"images_per_second": speed})


def show(preview: Preview, step: int, averaged: dict[str, torch.Tensor], tracker: Tracker) -> None:
    """A picture of what has been learned so far."""
    ranks.on_rank_zero(lambda: tracker.image("preview", preview(step, averaged), step))


def scored(score: Score, averaged: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """Figures of what has been learned so far, as sums and counts: they go into the next row, and into a checkpoint
    that comes before it, so that a resumed run has the same rows."""
    found = ranks.on_rank_zero(score, averaged)
    return {} if ranks.rank() else {name: (value, 1.0) for name, value in found.items()}


def save(engines: dict[str, Engine], checkpoints: Checkpoints, state: State) -> None:
    """Begin a checkpoint of every engine and the state; it is written while training goes on."""
    parts = {name: engine.copied() for name, engine in engines.items()}

    def write(folder: Path) -> list[Path]:
        written = []
        for name, part in parts.items():
            (folder / name).mkdir(exist_ok=True)
            written.append(folder / name / f"rank-{ranks.rank():05d}.safetensors")
            part.write(written[-1])
        return written

    first, *others = ranks.all_gather(state.sums)
    checkpoints.save(state.step, asdict(state) | {"sums": first, "others": others}, write)


def resume(name: str, engines: dict[str, Engine], checkpoints: Checkpoints, tracker: Tracker) -> State:
    """The state of the newest good checkpoint of stage `name`, engines loaded; metrics beyond it are taken back.

    The checkpoint may come from another number of ranks and another ZeRO stage.
    """
    found = ranks.on_rank_zero(checkpoints.newest)
    state = State()
    if found:
        folder, saved = found
        sums = [saved["sums"], *saved.pop("others", [])]
        for module, engine in engines.items():
            engine.load(folder / module)
        state = State(**saved | {"sums": share(sums)})
    ranks.on_rank_zero(checkpoints.drop_after, state.step)
    ranks.on_rank_zero(tracker.rewind, name, state.step)
    return state


def share(sums: list[ranks.Sums]) -> ranks.Sums:
    """This rank's sums, of those of the ranks that saved them: its own, or all on rank 0 where those were others."""
    if len(sums) == ranks.world_size():
        return sums[ranks.rank()]
    return {} if ranks.rank() else ranks.total(sums)
