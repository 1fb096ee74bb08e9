"""What the trainer adds to a step, and a checkpoint to a run: loops that take turns in one process.

bare torch      the stage's network and AdamW, on one batch that is there already, with torch's random numbers
bare DeepSpeed  the same, with the engine that the trainer has: averages of the weights included
trainer         the step as a run takes it: images read, draws keyed, figures summed up, checks, metrics
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
"""Turns that are not counted."""
SAVES = 3

Step = Callable[[], object]


@dataclass(kw_only=True, slots=True)
class TrainerBenchConfig:
    """What `tools/bench.py trainer` takes."""

    run: str = "runs/demo"
    """A run whose encoder is trained; its refiner is measured."""
    steps: int = 40
    """Steps of each loop that are counted."""


ConfigStore.instance().store(name="bench_trainer_schema", node=TrainerBenchConfig, provider="dvae")


def bare_loss(stage: RefinerTask, network: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The refiner's loss on images x (B, C, H, W) in [-1, 1], with nothing around it."""
    encoder: Encoder = stage.encoder
    with torch.no_grad(), stage.autocast():
        z = encoder.encode(x).sample(torch.randn(len(x), *encoder.latent_shape, device=x.device))
        conditioning = Conditioning(stage.to_device(encoder.decode(z).float()), z.float(), None)
    noise = NoiseSample(
        torch.rand(len(x), dtype=torch.float64), torch.randn_like(x), torch.ones(len(x), dtype=torch.bool)
    )
    return network(x, conditioning, noise).mean()


def bare_torch(stage: RefinerTask, x: torch.Tensor) -> Step:
    network: nn.Module = copy.deepcopy(stage.denoiser)
    config = stage.config
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)

    def step() -> None:
        with stage.autocast():
            loss = bare_loss(stage, network, x)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def bare_deepspeed(stage: RefinerTask, x: torch.Tensor) -> Step:
    engine = Engine(copy.deepcopy(stage.denoiser), stage.config).deepspeed

    def step() -> None:
        loss = bare_loss(stage, engine, x)
        engine.backward(loss)
        engine.step()
        loss.item()

    return step


def trainer(stage: RefinerTask, engine: Engine, data: Batches, state: TrainState, run: Path) -> Step:
    engines = {stage.name: engine}
    progress = Progress(stage.name, stage.config.steps, 0, quiet=True)

    def step() -> None:
        began = time.perf_counter()
        train_step(stage, engines, data.step(state.step * stage.config.batch), state, run)
        state.window_seconds += time.perf_counter() - began
        log_metrics(stage, state, NoTracker(), progress)

    return step


def take_turns(steps: dict[str, Step], turns: int) -> dict[str, list[float]]:
    """Seconds of each, once per turn, so that whatever else the machine does falls on all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + turns):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def stall(engine: Engine, state: TrainState, folder: Path) -> tuple[float, float]:
    """Seconds for which a checkpoint holds training up, and until it is published; medians."""
    held, whole = [], []
    checkpoints = Checkpoints(folder, keep=1)
    for _ in range(SAVES):
        state.step += 1
        began = time.perf_counter()
        save_checkpoint({"refiner": engine}, checkpoints, state)
        held.append(time.perf_counter() - began)
        checkpoints.finish()
        whole.append(time.perf_counter() - began)
    return statistics.median(held), statistics.median(whole)


def run(settings: TrainerBenchConfig) -> dict[str, float]:
    """Measure the refiner of a run whose encoder is trained; figures are printed and returned. Raises UserError."""
    of = Run(Path(settings.run))
    config = of.own_config()
    training = config.train_refiner
    if training.zero_stage or training.micro_batches > 1 or "encoder" not in config.stages:
        raise UserError(f"run={of.path}: this takes a run with an encoder, zero_stage=0 and whole batches: the demo's")
    start_distributed()
    made = load_models(of, config, "encoder")
    stage = RefinerTask(made.encoder, made.denoiser, open_latents(of, config, made), training, 0, default_device())
    with tempfile.TemporaryDirectory() as folder, open_loader(config, training, stage.name) as data:
        x = stage.images(data.step(0)[0])
        engine, state = Engine(copy.deepcopy(stage.denoiser), training), TrainState()
        steps = {
            "bare torch": bare_torch(stage, x),
            "bare DeepSpeed": bare_deepspeed(stage, x),
            "trainer": trainer(stage, engine, data, state, Path(folder)),
        }
        seconds = take_turns(steps, settings.steps)
        held, whole = stall(engine, state, Path(folder) / "checkpoints")
    return report(seconds, held, whole)


def report(seconds: dict[str, list[float]], held: float, whole: float) -> dict[str, float]:
    middle = {name: statistics.median(of) for name, of in seconds.items()}
    for name, value in middle.items():
        print(f"{name}: {value:.4f} s a step")

    def ratio(one: str, other: str) -> float:
        """Median over the turns of how much longer `one` takes."""
        return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))

    figures = {
        "trainer over bare DeepSpeed": ratio("trainer", "bare DeepSpeed"),
        "DeepSpeed over bare torch": ratio("bare DeepSpeed", "bare torch"),
        "stall over a step": held / middle["trainer"],
        "stall over the whole save": held / whole,
    }
    for name, value in figures.items():
        print(f"{name}: {value:.3f}")
    return figures
