"""What the stages encoder, prior and refiner do with a run folder."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from dvae import bundle, keyed, models
from dvae.config import RunConfig, TrainingConfig
from dvae.data.images import to_float, to_uint8
from dvae.data.loader import Loader
from dvae.data.order import Order
from dvae.data.reader import Shards
from dvae.errors import UserError
from dvae.models import Models
from dvae.pipeline import Pipeline
from dvae.registry.encoders import Posterior
from dvae.run import Run
from dvae.tracking import pictures
from dvae.tracking.tracker import Tracker
from dvae.training.checkpoint import Checkpoints
from dvae.training.engine import Engine, rank, world_size
from dvae.training.loop import Preview, train
from dvae.training.stages import EncoderStage, RefinerStage, Stage

PARTS = ("encoder", "prior", "denoiser")
"""What a bundle is made of, in the order in which it is trained."""
SCALE_IMAGES = 1024
"""Training images from which data_scale is measured."""
PREVIEW_IMAGES = 32


def open_shards(config: RunConfig, split: str) -> Shards:
    return Shards(
        Path(config.data.shards),
        split,
        cache_bytes=int(config.data.cache_gib * 2**30),
        max_bad_fraction=config.data.max_bad_fraction,
    )


def open_loader(config: RunConfig, training: TrainingConfig, stage: str) -> Loader:
    shards = open_shards(config, "train")
    order = Order(len(shards), keyed.child(config.seed, f"{stage} order"), config.data.block, config.data.window)
    return Loader(
        shards,
        order,
        batch=training.batch,
        rank=rank(),
        world=world_size(),
        accumulate=training.micro_batches,
        flip=config.data.flip,
        seed=keyed.child(config.seed, f"{stage} data"),
        threads=config.data.threads,
    )


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def take_up(run: Run, config: RunConfig, *parts: str) -> Models:
    """The run's models, with the weights of the finished stages `parts`. Raises UserError where one is not finished."""
    made = models.build(config)
    for part in parts:
        if not run.weights(part).exists():
            raise UserError(f"run={run.path} has no trained {part} yet: add the stage that trains it to stages=[...]")
        bundle.fit(made.trained()[part], bundle.load_weights(run.weights(part)), str(run.weights(part)))
    for module in made.trained().values():
        module.to(device())
    return made


def train_stage(
    run: Run, config: RunConfig, stage: Stage, training: TrainingConfig, part: str, preview: Preview
) -> None:
    """Train one stage, keep its averaged weights, and bring the bundle up to date."""
    checkpoints = Checkpoints(run.checkpoints(stage.name), training.keep)
    tracked = Tracker(run.path, config.tracking.wandb, stage.name)
    with tracked as tracker, open_loader(config, training, stage.name) as data:
        averaged, state = train(stage, data, checkpoints, tracker, preview, run.path)
    (weights,) = averaged.values()
    bundle.save_weights(run.weights(part), weights)
    export(run, config)
    record = {
        "seconds": state.seconds,
        "steps": state.step,
        "images_per_second": training.batch * state.step / state.seconds,
        "parameters": sum(p.numel() for module in stage.modules().values() for p in module.parameters()),
    }
    run.finish(stage.name, record)


def export(run: Run, config: RunConfig) -> None:
    """The bundle of all parts that are trained so far."""
    parts = {part: bundle.load_weights(run.weights(part)) for part in PARTS if run.weights(part).exists()}
    bundle.export(run.bundle, run.config_file.read_text(encoding="utf-8"), parts)


def preview_images(config: RunConfig) -> torch.Tensor:
    shards = open_shards(config, "heldout")
    return shards.read(torch.arange(min(PREVIEW_IMAGES, len(shards))).numpy())


def encoder_stage(run: Run, config: RunConfig) -> None:
    made = take_up(run, config)
    stage = EncoderStage(made.encoder, config.train_encoder, config.seed, device())
    shown = preview_images(config)

    def preview(step: int, engines: dict[str, Engine]) -> Path:
        copy = models.build(config)
        copy.encoder.load_state_dict(engines["encoder"].averaged())
        copy.encoder.eval().requires_grad_(False)
        x_hat = copy.encoder.decode(copy.encoder.encode(to_float(shown)).mean)
        path = run.images / f"encoder-{step:08d}.png"
        pictures.grid(torch.cat([shown, to_uint8(x_hat)]), path)
        return path

    train_stage(run, config, stage, config.train_encoder, "encoder", preview)


def prior_stage(run: Run, config: RunConfig) -> None:
    began = time.perf_counter()
    made = take_up(run, config, "encoder")
    posterior = posteriors(run, config, made)
    seed = keyed.child(config.seed, "prior") % 2**31
    figures = made.prior.fit(posterior.mean, posterior.logvar, seed)
    bundle.save_weights(run.weights("prior"), made.prior.state_dict())
    export(run, config)
    run.finish("prior", {"seconds": time.perf_counter() - began, **figures})


@torch.no_grad()
def posteriors(run: Run, config: RunConfig, made: Models) -> Posterior:
    """Posteriors of all training images, in the order of the data set; computed once and kept in the run folder."""
    path = run.weights("posteriors")
    if not path.exists():
        shards = open_shards(config, "train")
        made.encoder.eval()
        parts = []
        for indices in torch.arange(len(shards)).split(config.evaluate.batch):
            x = to_float(shards.read(indices.numpy())).to(device(), memory_format=torch.channels_last)
            parts.append(made.encoder.encode(x))
        state = {"mean": torch.cat([p.mean for p in parts]), "logvar": torch.cat([p.logvar for p in parts])}
        bundle.save_weights(path, {name: value.float() for name, value in state.items()})
    state = bundle.load_weights(path)
    return Posterior(state["mean"], state["logvar"])


def refiner_stage(run: Run, config: RunConfig) -> None:
    made = take_up(run, config, "encoder")
    known = None if config.data.flip else posteriors(run, config, made)
    stage = RefinerStage(made.encoder, made.denoiser, known, config.train_refiner, config.seed, device())
    if config.denoiser.data_scale is None:
        made.denoiser.data_scale.fill_(measure_scale(config, stage))

    def preview(step: int, engines: dict[str, Engine]) -> Path:
        copy = take_up(run, config, "encoder", "prior")
        copy.denoiser.load_state_dict(engines["refiner"].averaged())
        copy.denoiser.eval()
        vae, refined = Pipeline(config, copy).generate(PREVIEW_IMAGES, config.seed)
        path = run.images / f"refiner-{step:08d}.png"
        pictures.grid(torch.cat([vae, refined]), path)
        return path

    train_stage(run, config, stage, config.train_refiner, "denoiser", preview)


@torch.no_grad()
def measure_scale(config: RunConfig, stage: RefinerStage) -> float:
    """1 / standard deviation of the unscaled clean state, over the first training images of the run."""
    loader = open_loader(config, config.train_refiner, stage.name)
    states = []
    for start in range(0, SCALE_IMAGES, config.train_refiner.batch):
        for batch in loader.step(start):
            x = stage.images(batch)
            states.append(stage.denoiser.to_state(x, stage.given(batch, x)) / stage.denoiser.data_scale)
    return float(1.0 / torch.cat(states).std())
