"""The training loop. All stages use it, with one process or many."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dvae.data.loading.loader import Batch, Batches
from dvae.errors import Stopped
from dvae.tracking.console import Progress
from dvae.tracking.tracker import Tracker
from dvae.training.engine.deepspeed_engine import Engine, learning_rate
from dvae.training.engine.snapshot_writer import SnapshotWriter
from dvae.training.metric_sums import MetricSums, add_metric_sums
from dvae.training.resilience import nonfinite, ranks, stopping, watchdog
from dvae.training.resilience.checkpoint import Checkpoints
from dvae.training.train_state import TrainState, resume, save_checkpoint
from dvae.training.train_task import TrainTask
from dvae.utils import rng
from dvae.utils.weights import StateDict

PreviewHook = Callable[[int, StateDict], Path]
"""preview(step, averaged weights) draws a preview picture and returns its path. It is called on rank 0 only."""

ScoreHook = Callable[[StateDict], dict[str, float]]
"""score(averaged weights) returns metrics of generated samples, for metrics.jsonl. It is called on rank 0 only."""


@dataclass(frozen=True)
class TrainHooks:
    """What a stage computes from its averaged weights during training."""

    preview: PreviewHook | None = None
    """Draws a preview every `preview_every` steps."""
    score: ScoreHook | None = None
    """Computes metrics of samples every `score_every` steps."""
    score_every: int = 0
    """Steps between scores (0: none)."""


def train(
    task: TrainTask,
    data: Batches,
    checkpoints: Checkpoints,
    tracker: Tracker,
    hooks: TrainHooks,
    run: Path,
) -> tuple[dict[str, StateDict], TrainState]:
    """Train `task` to its last step. Training resumes from the newest intact checkpoint, if there is one.

    Every rank takes part. Returns the averaged weights of each module, and the final state. Raises Stopped, after
    saving, if a signal or the time limit requests it. Raises MachineError if more steps are non-finite than
    `nonfinite_skips` allows.
    """
    config = task.config
    engines = {name: Engine(module, task.module_config(name)) for name, module in task.modules().items()}
    state = resume(task.name, engines, checkpoints, tracker)
    snapshots = SnapshotWriter(run / "snapshots" / task.name, task.module_config(task.name))
    ranks.on_rank_zero(snapshots.drop_after, state.step)  # the run takes the steps after it again
    progress = Progress(task.name, config.steps, state.step, quiet=ranks.rank() > 0)
    stop_request = stopping.current()
    with progress, stop_request.handle_signals(), checkpoints:
        while state.step < config.steps:
            began = time.perf_counter()
            watchdog.heartbeat(task.name, state.step + 1, "data")
            batches = data.step(state.step * config.batch)
            train_step(task, engines, batches, state, run)
            elapsed = time.perf_counter() - began
            state.seconds += elapsed
            state.window_seconds += elapsed
            watchdog.heartbeat(task.name, state.step, "end")
            if hooks.score and hooks.score_every and state.step % hooks.score_every == 0:
                watchdog.suspend(task.name, state.step, "scores")
                state.add_metrics(compute_scores(hooks.score, engines[task.name].averaged_weights()))
            log_metrics(task, state, tracker, progress)
            checkpoints.check()
            # All ranks must agree here: if one rank stopped alone, the others would wait for it in the next step.
            stop_reason = stop_request.reason_of_any_rank()
            # Previews and saves may take long, so the watchdog must not count them as a hang.
            watchdog.suspend(task.name, state.step, "preview or save")
            if hooks.preview and config.preview_every and state.step % config.preview_every == 0:
                log_preview(hooks.preview, state.step, engines[task.name].averaged_weights(), tracker)
            # Snapshots come before the checkpoint: a run that resumes from it must find the snapshots of its step.
            snapshots.write_if_due(state.step, engines[task.name])
            if state.step % config.save_every == 0 or state.step == config.steps or stop_reason:
                save_checkpoint(engines, checkpoints, state)
            if stop_reason and state.step < config.steps:
                where = f"stopped at {task.name} step {state.step} ({stop_reason})"
                raise Stopped(f"{where}, saved: the same command again resumes", stop_reason)
    averaged = {name: engine.averaged_weights() for name, engine in engines.items()}
    for engine in engines.values():
        engine.close()
    return averaged, state


def train_step(task: TrainTask, engines: dict[str, Engine], batches: list[Batch], state: TrainState, run: Path) -> None:
    """Take one optimizer step of every module on this rank's micro-batches, and advance the state.

    Either every module steps or none does. Raises MachineError if the step is skipped and `nonfinite_skips` is
    exhausted.
    """
    number = state.step + 1
    # The discriminator of a GAN, for example, takes no steps before its start step.
    trained = {name: engine for name, engine in engines.items() if task.trains(name, number)}
    # The forward passes change buffers, such as running statistics. A skipped step must restore them.
    buffers = nonfinite.BufferBackup(trained) if task.config.nonfinite_skips else None
    metrics = accumulate_gradients(task, engines, batches, number)
    watchdog.heartbeat(task.name, number, "step")
    # A dict of all engines, and not all() over a generator: gradients_finite is collective, so every rank must call it
    # for every engine. all() would stop at the first engine that is not finite.
    finite = {name: engine.gradients_finite() for name, engine in trained.items()}
    all_finite = all(finite.values())
    if not all_finite:
        watchdog.suspend(task.name, number, "replay bundle")
        state.skipped += 1
        # This must come before the step, which releases the gradients.
        nonfinite.record_nonfinite_step(task, trained, batches, metrics, number, state.skipped, run)
    for engine in trained.values():
        engine.step(number, all_finite)
    if buffers and not all_finite:
        buffers.restore()
    if all_finite:
        for part in metrics:
            state.add_metrics(part)
        for name, engine in trained.items():
            state.add_metrics({f"grad_norm_{name}" if len(engines) > 1 else "grad_norm": (engine.grad_norm, 1.0)})
    state.step = number


def accumulate_gradients(
    task: TrainTask, engines: dict[str, Engine], batches: list[Batch], number: int
) -> list[MetricSums]:
    """Accumulate the gradients of step `number` for every module over this rank's micro-batches.

    Returns the metrics of each micro-batch of each module.
    """
    metrics = []
    for name, engine in engines.items():
        if not task.trains(name, number):
            continue
        for part, batch in enumerate(batches):
            seed_dropout(task.seed, number, part)
            watchdog.heartbeat(task.name, number, "forward")
            output = task.loss(name, engines, batch)
            watchdog.heartbeat(task.name, number, "backward")
            engine.backward(output.loss)
            metrics.append(output.metrics)
            if part + 1 < len(batches):
                engine.step(number)  # this only ends the micro-batch; `train_step` takes the step after the last one
    return metrics


def seed_dropout(seed: int, step: int, part: int) -> None:
    """Seed torch's global generator, from which nn.Dropout draws, for one micro-batch.

    All other random numbers are keyed by sample. Dropout cannot be, so the key is the number of the micro-batch among
    the micro-batches of all ranks in this step. So a resumed run draws the same numbers.
    """
    number = part * ranks.world_size() + ranks.rank()
    torch.manual_seed(int(rng.generator(seed, f"dropout 0 {number}", step).integers(2**62)))


def log_metrics(task: TrainTask, state: TrainState, tracker: Tracker, progress: Progress) -> None:
    """Write a row of metrics every `log_every` steps and at the last step. Values are means over all ranks."""
    config = task.config
    recent = {"loss": state.sums["loss"][0] / state.sums["loss"][1]} if "loss" in state.sums else {}
    progress.update(state.step, config.batch, recent)
    if state.step % config.log_every == 0 or state.step == config.steps:
        steps = state.step % config.log_every or config.log_every
        speed = steps * config.batch / state.window_seconds
        state.sums = add_metric_sums(ranks.all_gather(state.sums))
        row: dict[str, Any] = state.pop_means() | {"lr": learning_rate(config, state.step), "seconds": state.seconds}
        row |= {"skipped": state.skipped} if state.skipped else {}
        tracker.log(state.step, row | {"images_per_second": speed})


def log_preview(preview: PreviewHook, step: int, averaged: StateDict, tracker: Tracker) -> None:
    """Draw a preview picture on rank 0 and log it. The other ranks wait."""
    ranks.on_rank_zero(lambda: tracker.image("preview", preview(step, averaged), step))


def compute_scores(score: ScoreHook, averaged: StateDict) -> MetricSums:
    """Compute scores of samples on rank 0, as sums and counts. On other ranks the result is empty.

    The scores are part of the state, so they enter the next row of metrics. If a checkpoint comes first, it holds them
    too, so a resumed run writes the same rows.
    """
    scores = ranks.on_rank_zero(score, averaged)
    return {} if ranks.rank() else {name: (value, 1.0) for name, value in scores.items()}
