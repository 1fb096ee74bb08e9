"""The training loop: one for every stage, on one process as on many."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dvae import files, keyed
from dvae.data.loader import Batch, Batches
from dvae.errors import MachineError, UserError
from dvae.tracking.console import Progress
from dvae.tracking.tracker import Tracker
from dvae.training import ranks
from dvae.training.checkpoint import Checkpoints
from dvae.training.engine import Engine, learning_rate
from dvae.training.stages import Stage, StepOutput
from dvae.training.stopping import Stopped, on_signals

Preview = Callable[[int, dict[str, torch.Tensor]], Path]
"""preview(step, averaged weights of the stage) draws a picture of what has been learnt so far, and says where it lies;
on rank 0 alone."""


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
    preview: Preview | None,
    run: Path,
) -> tuple[dict[str, dict[str, torch.Tensor]], State]:
    """Train `stage` to its last step, from the newest good checkpoint if there is one. Every rank takes part.

    Returns the averaged weights of each module, and the final state. Raises Stopped after saving when a signal asked
    for it, MachineError where a step was not finite.
    """
    config = stage.config
    engines = {name: Engine(module, stage.settings(name)) for name, module in stage.modules().items()}
    state = resume(stage, engines, checkpoints, tracker)
    progress = Progress(stage.name, config.steps, state.step, quiet=ranks.rank() > 0)
    with progress, on_signals() as stopping:
        while state.step < config.steps:
            began = time.perf_counter()
            batches = data.step(state.step * config.batch)
            take_step(stage, engines, batches, state, run)
            elapsed = time.perf_counter() - began
            state.seconds += elapsed
            state.window_seconds += elapsed
            log(stage, state, tracker, progress)
            if preview and config.preview_every and state.step % config.preview_every == 0:
                show(preview, state.step, engines[stage.name].averaged(), tracker)
            asked = ranks.any_rank(stopping.asked)
            if state.step % config.save_every == 0 or state.step == config.steps or asked:
                save(engines, checkpoints, state)
            if asked and state.step < config.steps:
                raise Stopped(f"stopped at {stage.name} step {state.step}, saved: the same command again resumes")
    averaged = {name: engine.averaged() for name, engine in engines.items()}
    for engine in engines.values():
        engine.close()
    return averaged, state


def take_step(stage: Stage, engines: dict[str, Engine], batches: list[Batch], state: State, run: Path) -> None:
    """One optimiser step of every module over this rank's micro-batches; advances the state."""
    number = state.step + 1
    for name, engine in engines.items():
        if not stage.trains(name, number):
            continue
        for part, batch in enumerate(batches):
            seed_dropout(stage.seed, number, part)
            out: StepOutput = stage.loss(name, engines, batch)
            engine.backward(out.loss)
            applied = engine.step(number)
            state.add(out.metrics)
        if not applied:
            refuse(stage, number, batches, run)
        state.add({f"grad_norm_{name}" if len(engines) > 1 else "grad_norm": (engine.grad_norm, 1.0)})
    state.step = number


def seed_dropout(seed: int, step: int, part: int) -> None:
    """nn.Dropout draws from torch's own generator, so that is keyed by hand, by the micro-batch in its step."""
    number = part * ranks.world_size() + ranks.rank()
    torch.manual_seed(int(keyed.generator(seed, f"dropout 0 {number}", step).integers(2**62)))


def refuse(stage: Stage, step: int, batches: list[Batch], run: Path) -> None:
    """A non-finite step: keep nothing of it, save its sample numbers, and stop. Every rank refuses the same step."""
    path = run / f"nonfinite-{stage.name}-{step:08d}.json"
    mine = [(batch.keys.tolist(), batch.indices.tolist()) for batch in batches]
    seen = [batch for others in ranks.gathered(mine) for batch in others]
    samples = [key for keys, _ in seen for key in keys]
    indices = [index for _, batch in seen for index in batch]
    record = {"stage": stage.name, "step": step, "samples": samples, "indices": indices}
    ranks.on_first(files.write_json, path, record)
    raise MachineError(
        f"{stage.name} step {step}: a gradient is not finite; the step was left out, its samples are in {path}, "
        "the last checkpoint is good: lower the learning rate or look at those samples"
    )


def log(stage: Stage, state: State, tracker: Tracker, progress: Progress) -> None:
    """A row of metrics every log_every steps, and at the end: means over all ranks."""
    config = stage.config
    recent = {"loss": state.sums["loss"][0] / state.sums["loss"][1]} if "loss" in state.sums else {}
    progress.update(state.step, config.batch, recent)
    if state.step % config.log_every == 0 or state.step == config.steps:
        steps = state.step % config.log_every or config.log_every
        speed = steps * config.batch / state.window_seconds
        state.sums = ranks.total(ranks.gathered(state.sums))
        row: dict[str, Any] = state.row() | {"lr": learning_rate(config, state.step), "seconds": state.seconds}
        tracker.log(state.step, row | {"images_per_second": speed})


def show(preview: Preview, step: int, averaged: dict[str, torch.Tensor], tracker: Tracker) -> None:
    """A picture of what has been learnt so far."""
    ranks.on_first(lambda: tracker.image("preview", preview(step, averaged), step))


def save(engines: dict[str, Engine], checkpoints: Checkpoints, state: State) -> None:
    """Publish a checkpoint of every engine and the state."""

    def write(folder: Path) -> None:
        for name, engine in engines.items():
            engine.save(folder / name)

    first, *others = ranks.gathered(state.sums)
    checkpoints.save(state.step, asdict(state) | {"sums": first, "others": others}, write)


def resume(stage: Stage, engines: dict[str, Engine], checkpoints: Checkpoints, tracker: Tracker) -> State:
    """The state of the newest good checkpoint, engines loaded; metrics beyond it are taken back."""
    found = ranks.on_first(checkpoints.newest)
    state = State()
    if found:
        folder, saved = found
        sums = [saved["sums"], *saved.pop("others", [])]
        if len(sums) != ranks.world_size():
            refuse_other_ranks(stage, len(sums), folder)
        for name, engine in engines.items():
            engine.load(folder / name)
        state = State(**saved | {"sums": share(sums)})
    ranks.on_first(checkpoints.drop_after, state.step)
    ranks.on_first(tracker.rewind, stage.name, state.step)
    return state


def share(sums: list[ranks.Sums]) -> ranks.Sums:
    """This rank's sums, of those of the ranks that saved them: its own, or all on rank 0 where those were others."""
    if len(sums) == ranks.world_size():
        return sums[ranks.rank()]
    return {} if ranks.rank() else ranks.total(sums)


def refuse_other_ranks(stage: Stage, count: int, folder: Path) -> None:
    """Raise UserError where `folder`, saved by `count` ranks, holds an optimiser that was cut among them."""
    if stage.config.zero_stage:
        raise UserError(
            f"launcher.count={ranks.world_size()}: {folder} was saved by {count}, and zero_stage="
            f"{stage.config.zero_stage} cuts it among them: use as many ranks until the {stage.name} is trained"
        )
