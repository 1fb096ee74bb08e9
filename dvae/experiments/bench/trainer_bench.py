"""Measure the overhead of the trainer per step, and the time that a checkpoint blocks training.

Three loops alternate in one process:

bare torch      the stage's network and AdamW, on one batch in memory, with torch's random numbers
bare DeepSpeed  the same with the trainer's engine, including the averaged weights (EMA)
trainer         a step of a real run: reading images, keyed random draws, checks and metrics
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.core.config_store import ConfigStore
from torch import nn

from dvae.data.loading.loader import Batches
from dvae.diffusion.conditioning import Conditioning, NoiseSample
from dvae.errors import UserError
from dvae.registry.encoders.base import Encoder
from dvae.runs.folder import Run
from dvae.stages.latent_sources import open_latents
from dvae.stages.refiner import RefinerTask
from dvae.stages.run_models import default_device, load_models
from dvae.tracking.console import Progress
from dvae.tracking.tracker import NoTracker
from dvae.training.batches import open_loader
from dvae.training.engine.deepspeed_engine import Engine, start_distributed
from dvae.training.loop import log_metrics, train_step
from dvae.training.resilience.checkpoint import Checkpoints
from dvae.training.train_state import TrainState, save_checkpoint

WARM_UP = 3
"""Turns before the measurement starts."""
SAVES = 3
"""Number of checkpoints to measure."""

Step = Callable[[], object]


@dataclass(kw_only=True, slots=True)
class TrainerBenchConfig:
    """Settings of `tools/bench.py trainer`."""

    run: str = "runs/demo"
    """Folder of a run with a trained encoder. Its refiner is measured."""
    steps: int = 40
    """Measured steps of each loop, after the warm-up."""


ConfigStore.instance().store(name="bench_trainer_schema", node=TrainerBenchConfig, provider="dvae")


def bare_loss(task: RefinerTask, network: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Compute the refiner's loss on images x (B, C, H, W) in [-1, 1], without the trainer's bookkeeping."""
    encoder: Encoder = task.encoder
    with torch.no_grad(), task.autocast():
        z = encoder.encode(x).sample(torch.randn(len(x), *encoder.latent_shape, device=x.device))
        conditioning = Conditioning(task.to_device(encoder.decode(z).float()), z.float(), None)
    noise = NoiseSample(
        torch.rand(len(x), dtype=torch.float64), torch.randn_like(x), torch.ones(len(x), dtype=torch.bool)
    )
    return network(x, conditioning, noise).mean()


def bare_torch(task: RefinerTask, x: torch.Tensor) -> Step:
    """Return a training step with plain torch, on images x."""
    network: nn.Module = copy.deepcopy(task.denoiser)
    config = task.config
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)

    def step() -> None:
        with task.autocast():
            loss = bare_loss(task, network, x)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def bare_deepspeed(task: RefinerTask, x: torch.Tensor) -> Step:
    """Return a training step with the DeepSpeed engine alone, on images x."""
    engine = Engine(copy.deepcopy(task.denoiser), task.config).deepspeed

    def step() -> None:
        loss = bare_loss(task, engine, x)
        engine.backward(loss)
        engine.step()
        loss.item()

    return step


def trainer(task: RefinerTask, engine: Engine, data: Batches, state: TrainState, run: Path) -> Step:
    """Return a complete step of the trainer on batches from `data`."""
    engines = {task.name: engine}
    progress = Progress(task.name, task.config.steps, 0, quiet=True)

    def step() -> None:
        began = time.perf_counter()
        train_step(task, engines, data.step(state.step * task.config.batch), state, run)
        state.window_seconds += time.perf_counter() - began
        log_metrics(task, state, NoTracker(), progress)

    return step


def wall_seconds(step: Step) -> float:
    """Run a step and return its wall-clock seconds."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def time_alternating(
    steps: dict[str, Step], turns: int, measure: Callable[[Step], float] = wall_seconds
) -> dict[str, list[float]]:
    """Measure each step once per turn and return the seconds of all turns by name.

    The steps alternate, so that other load on the machine affects them equally.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + turns):
        for name, step in steps.items():
            spent = measure(step)
            if turn >= WARM_UP:
                seconds[name].append(spent)
    return seconds


def time_checkpoints(engine: Engine, state: TrainState, folder: Path) -> tuple[float, float]:
    """Return the median seconds that a checkpoint blocks training, and the median seconds until it is published."""
    blocked, total = [], []
    checkpoints = Checkpoints(folder, keep=1)
    for _ in range(SAVES):
        state.step += 1
        began = time.perf_counter()
        save_checkpoint({"refiner": engine}, checkpoints, state)
        blocked.append(time.perf_counter() - began)
        checkpoints.finish()
        total.append(time.perf_counter() - began)
    return statistics.median(blocked), statistics.median(total)


def run(settings: TrainerBenchConfig) -> dict[str, float]:
    """Measure the refiner of a run with a trained encoder, and print and return the figures.

    Raises UserError if the run has no encoder stage, uses ZeRO, or has more than one micro-batch.
    """
    measured_run = Run(Path(settings.run))
    config = measured_run.own_config()
    training = config.training("refiner")
    if training.zero_stage or training.micro_batches > 1 or "encoder" not in config.stages:
        raise UserError(
            f"run={measured_run.path}: use a run with an encoder, zero_stage=0 and micro_batches=1, such as the demo's"
        )
    start_distributed()
    models = load_models(measured_run, config, "encoder")
    task = RefinerTask(
        models.encoder, models.denoiser, open_latents(measured_run, config, models), training, 0, default_device()
    )
    with tempfile.TemporaryDirectory() as folder, open_loader(config, training, task.name) as data:
        x = task.images(data.step(0)[0])
        engine, state = Engine(copy.deepcopy(task.denoiser), training), TrainState()
        steps = {
            "bare torch": bare_torch(task, x),
            "bare DeepSpeed": bare_deepspeed(task, x),
            "trainer": trainer(task, engine, data, state, Path(folder)),
        }
        seconds = time_alternating(steps, settings.steps)
        blocked, total = time_checkpoints(engine, state, Path(folder) / "checkpoints")
    return report(seconds, blocked, total)


def report(seconds: dict[str, list[float]], blocked: float, total: float) -> dict[str, float]:
    """Print and return the ratios of the measured times.

    `blocked` and `total` are the seconds that a checkpoint blocks training, and until it is published.
    """
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name}: {value:.4f} s per step")

    def ratio(one: str, other: str) -> float:
        """Return the median over the turns of the time of `one` divided by the time of `other`."""
        return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))

    figures = {
        "trainer over bare DeepSpeed": ratio("trainer", "bare DeepSpeed"),
        "DeepSpeed over bare torch": ratio("bare DeepSpeed", "bare torch"),
        "stall over a step": blocked / medians["trainer"],
        "stall over the whole save": blocked / total,
    }
    for name, value in figures.items():
        print(f"{name}: {value:.3f}")
    return figures
