"""What the stages encoder, prior, refiner and classifier do with a run folder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from dvae.config import compose as configuration
from dvae.config.model_config import model_config
from dvae.config.schema import RunConfig, TrainingConfig
from dvae.data.images import to_float, to_uint8
from dvae.data.loading.loader import Batches
from dvae.inference.pipeline import Pipeline
from dvae.layers.whitening import Moments
from dvae.models import bundle_export, bundle_reuse, components
from dvae.models.components import Models
from dvae.registry.encoders.base import Encoder
from dvae.runs.folder import Run
from dvae.stages.cache import cache_record, encode, open_latents, posteriors
from dvae.stages.latent_sources import Encoded
from dvae.stages.losses import ClassifierStage, EncoderStage, GanStage, RefinerStage, Stage
from dvae.toy2d import points
from dvae.tracking import pictures, scatter
from dvae.tracking.tracker import NoTracker, Tracker
from dvae.training.batches import open_loader, open_shards
from dvae.training.loop import State, TrainHooks, train
from dvae.training.resilience import ranks
from dvae.training.resilience.checkpoint import Checkpoints
from dvae.utils import rng
from dvae.utils.weights import fit_weights

Weights = dict[str, torch.Tensor]
PARTS = ("encoder", "prior", "denoiser", "classifier")
"""What a bundle is made of, in the order in which it is trained."""
SCALE_IMAGES = 1024
"""Training images from which data_scale is measured."""
PREVIEW_IMAGES = 32
PREVIEW_POINTS = 1000
HELDOUT_DRAWS = 1024
"""Noisy states of held-out images on which a trained classifier is tried."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_models(run: Run, config: RunConfig, *parts: str) -> Models:
    """The run's models, with the weights of the finished stages `parts`. Raises UserError where one is not finished."""
    made = components.build_models(config)
    for part in parts:
        if part not in made.trained_parts():  # it has nothing to learn
            continue
        fit_weights(made.trained_parts()[part], run.load_weights(part), str(run.weights(part)))
    for module in made.trained_parts().values():
        module.to(device())
    return made


def train_stage(
    run: Run,
    config: RunConfig,
    stage: Stage,
    training: TrainingConfig,
    parts: Mapping[str, str],
    looks: TrainHooks,
    figures: Callable[[Weights], dict[str, float]] | None = None,
) -> None:
    """Train one stage, keep its averaged weights, and bring the bundle up to date. Every rank takes part.

    parts: by name, how the names of their weights begin in what the stage trains; that is taken off. `figures` of the
    averaged weights go into the stage's record.
    """
    parameters = sum(p.numel() for p in stage.modules()[stage.name].parameters())  # now: ZeRO 3 will cut them up
    checkpoints = Checkpoints(run.checkpoints(stage.name), training.keep, training.keep_every)
    tracked = NoTracker() if ranks.rank() else Tracker(run.path, config.tracking.wandb, stage.name)
    with tracked as tracker, open_loader(config, training, stage.name, images=stage.needs_images) as data:
        averaged, state = train(stage, data, checkpoints, tracker, looks, run.path)
    weights = averaged[stage.name]

    def finish() -> None:
        for part, prefix in parts.items():
            run.save_weights(part, part_of(weights, prefix))
        export(run, config)
        record = {
            "seconds": state.seconds,
            "steps": state.step,
            "images_per_second": training.batch * state.step / state.seconds,
            "parameters": parameters,
        }
        run.finish(stage.name, record | (figures(weights) if figures else {}))

    ranks.on_rank_zero(finish)


def part_of(weights: Weights, prefix: str) -> Weights:
    """The weights whose names begin so, with that taken off."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def export(run: Run, config: RunConfig) -> None:
    """The bundle of all parts that are trained so far."""
    parts = {part: run.load_weights(part) for part in PARTS if run.has_weights(part)}
    bundle_export.export(run.bundle, config, parts)


def preview_images(config: RunConfig) -> torch.Tensor:
    shards = open_shards(config, "heldout")
    return shards.read(torch.arange(min(PREVIEW_IMAGES, len(shards))).numpy())


def encoder_stage(run: Run, config: RunConfig) -> None:
    made = load_models(run, config)
    given = bundle_reuse.adopted_encoder_weights(config, made.encoder)
    if given is not None:
        ranks.on_rank_zero(adopt_encoder, run, config, made.encoder, given)
        return
    stage = new_encoder_stage(made.encoder, config)
    shown = preview_images(config)

    def preview(step: int, averaged: Weights) -> Path:
        copy = components.build_models(config)
        copy.encoder.load_state_dict(averaged)
        copy.encoder.eval().requires_grad_(False)
        x_hat = copy.encoder.decode(copy.encoder.encode(to_float(shown)).mean)
        path = run.images / f"encoder-{step:08d}.png"
        pictures.grid(torch.cat([shown, to_uint8(x_hat)]), path)
        return path

    train_stage(run, config, stage, config.train_encoder, {"encoder": ""}, TrainHooks(preview))


def new_encoder_stage(encoder: Encoder, config: RunConfig) -> EncoderStage:
    """The stage that trains `encoder`; the first weights of a discriminator are keyed by the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.child(config.seed, "discriminator"))
        adversary = encoder.adversary()
    if adversary is None:
        return EncoderStage(encoder, config.train_encoder, config.seed, device())
    return GanStage(encoder, adversary, config.train_encoder, config.seed, device())


def adopt_encoder(run: Run, config: RunConfig, encoder: Encoder, weights: Weights) -> None:
    """Keep weights that were trained elsewhere as those of the run's encoder."""
    began = time.perf_counter()
    fit_weights(encoder, weights, "the given encoder")
    run.save_weights("encoder", weights)
    export(run, config)
    parameters = sum(p.numel() for p in encoder.parameters())
    run.finish("encoder", {"seconds": time.perf_counter() - began, "parameters": parameters})


def cache_stage(run: Run, config: RunConfig) -> None:
    run.finish("cache", cache_record(run, config, load_models(run, config, "encoder")))


def prior_stage(run: Run, config: RunConfig) -> None:
    began = time.perf_counter()
    made = load_models(run, config, "encoder")
    posterior = posteriors(run, config, made)
    seed = rng.child(config.seed, "prior") % 2**31
    figures = made.prior.fit(posterior.mean, posterior.logvar, seed)
    run.save_weights("prior", made.prior.state_dict())
    export(run, config)
    run.finish("prior", {"seconds": time.perf_counter() - began, **figures})


def open_stage(run: Run, config: RunConfig, name: str) -> Stage:
    """The training stage `name`, with its modules as they are before the first step."""
    if name == "encoder":
        return new_encoder_stage(load_models(run, config).encoder, config)
    return new_refiner_stage(run, config) if name == "refiner" else new_classifier_stage(run, config)


def new_refiner_stage(run: Run, config: RunConfig) -> RefinerStage:
    made = load_models(run, config, "encoder")
    latents = open_latents(run, config, made)
    return RefinerStage(made.encoder, made.denoiser, latents, config.train_refiner, config.seed, device())


def new_classifier_stage(run: Run, config: RunConfig) -> ClassifierStage:
    made = load_models(run, config, "encoder", "denoiser")
    assert made.classifier is not None
    latents, training = open_latents(run, config, made), config.train_classifier
    return ClassifierStage(made.classifier, made.encoder, made.denoiser, latents, training, config.seed, device())


def refiner_stage(run: Run, config: RunConfig, score: Callable[[Pipeline], dict[str, float]]) -> None:
    """Every evaluate.every_steps steps `score` gives figures of the pipeline of the averaged weights."""
    stage = new_refiner_stage(run, config)
    if config.denoiser.data_scale is None:
        stage.denoiser.data_scale.fill_(ranks.on_rank_zero(measure_scale, config, stage))
    if config.denoiser.pca_components:
        stage.denoiser.whitening.fit(ranks.on_rank_zero(measure_latents, run, config, stage))

    def preview(step: int, averaged: Weights) -> Path:
        pipeline, name = pipeline_of(run, config, averaged), f"refiner-{step:08d}.png"
        if configuration.uses_stream(config):
            return preview_points(run, config, pipeline, name)
        return preview_samples(run, pipeline, name)

    def scored(averaged: Weights) -> dict[str, float]:
        return score(pipeline_of(run, config, averaged))

    looks = TrainHooks(preview, scored, config.evaluate.every_steps)
    train_stage(run, config, stage, config.train_refiner, {"denoiser": ""}, looks)


def measure_latents(run: Run, config: RunConfig, stage: RefinerStage) -> Moments:
    """Of the posterior means of all training images."""
    moments = Moments(math.prod(stage.encoder.latent_shape))
    if run.has_weights("posteriors"):
        for means in run.load_weights("posteriors")["mean"].split(SCALE_IMAGES):
            moments.add(means)
        return moments
    shards = open_shards(config, "train")
    for posterior in encode(config, stage.encoder, shards, 0, len(shards)):
        moments.add(posterior.mean)
    return moments


def pipeline_of(run: Run, config: RunConfig, denoiser: Weights) -> Pipeline:
    """Encoder and prior of the finished stages, with the weights of a denoiser that is still trained."""
    copy = load_models(run, config, "encoder", "prior")
    copy.denoiser.load_state_dict(denoiser)
    copy.denoiser.eval()
    return Pipeline(model_config(config), copy, config.evaluate.batch)


def preview_samples(run: Run, pipeline: Pipeline, name: str) -> Path:
    """What the pipeline draws, as images/NAME; VAE samples above the refined ones of the same z."""
    vae, refined = pipeline.generate(PREVIEW_IMAGES, pipeline.config.seed)
    path = run.images / name
    pictures.grid(refined if vae is None else torch.cat([vae, refined]), path)
    return path


def preview_points(run: Run, config: RunConfig, pipeline: Pipeline, name: str) -> Path:
    """True points beside those that the pipeline draws, as images/NAME."""
    path = run.images / name
    source = points.open_source(config)
    groups = points.groups(config, source).items()
    true = {name: points.true(source, label, PREVIEW_POINTS, config.seed) for name, label in groups}
    drawn = {name: points.drawn(pipeline, label, PREVIEW_POINTS, config.seed) for name, label in groups}
    scatter.compare(true, drawn, path)
    return path


def classifier_stage(run: Run, config: RunConfig) -> None:
    stage, training = new_classifier_stage(run, config), config.train_classifier
    classifier, encoder = stage.classifier, stage.encoder
    seed = rng.child(config.seed, "held-out")
    unseen = ClassifierStage(classifier, encoder, stage.denoiser, Encoded(encoder), training, seed, device())

    with open_loader(config, training, "classifier held-out", "heldout", whole=True) as heldout:

        def figures(weights: Weights) -> dict[str, float]:
            classifier.load_state_dict(weights)
            return heldout_accuracy(unseen, heldout)

        train_stage(run, config, stage, training, {"classifier": ""}, TrainHooks(), figures)


@torch.no_grad()
def heldout_accuracy(stage: ClassifierStage, heldout: Batches) -> dict[str, float]:
    """Accuracy on noisy states of held-out images, overall and by tenth of t."""
    stage.classifier.eval()
    sums = State()
    for start in range(0, HELDOUT_DRAWS, stage.config.batch):
        for batch in heldout.step(start):
            sums.add(stage.loss("classifier", stage.modules(), batch).metrics)
    return {f"heldout_{name}": value for name, value in sums.row().items() if name.startswith("accuracy")}


@torch.no_grad()
def measure_scale(config: RunConfig, stage: RefinerStage) -> float:
    """1 / standard deviation of the unscaled clean state, over the first training images of the run."""
    loader = open_loader(config, config.train_refiner, stage.name, images=stage.needs_images, whole=True)
    states = []
    for start in range(0, SCALE_IMAGES, config.train_refiner.batch):
        for batch in loader.step(start):
            states.append(stage.denoiser.to_state(*stage.example(batch)) / stage.denoiser.data_scale)
    return float(1.0 / torch.cat(states).std())
