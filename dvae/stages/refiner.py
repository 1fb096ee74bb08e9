"""The stage refiner: train the diffusion model, on images conditioned on their reconstructions, or on latents."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from dvae.config.compose import uses_stream
from dvae.config.schema import RunConfig, TrainingConfig
from dvae.data.loading.loader import Batch
from dvae.layers.whitening import RunningCovariance
from dvae.registry.stages.base import STAGES, StageConfig
from dvae.runs.folder import Run
from dvae.stages.base import TrainStage
from dvae.stages.latent_sources import open_latents
from dvae.stages.noisy_task import NoisyTask
from dvae.stages.online_scores import online_scorer
from dvae.stages.posteriors import encode_images
from dvae.stages.previews import build_pipeline, save_points, save_samples
from dvae.stages.run_models import default_device, load_models
from dvae.stages.train_stage import train_stage
from dvae.training.batches import open_loader, open_shards
from dvae.training.loop import TrainHooks
from dvae.training.metric_sums import metric_sums, metrics_by_time
from dvae.training.resilience import ranks
from dvae.training.train_task import Engines, StepOutput, TrainTask
from dvae.utils.weights import StateDict

SCALE_IMAGES = 1024
"""Minimum number of training images from which data_scale is measured."""


class RefinerTask(NoisyTask):
    """The task that trains the refiner with its denoising loss."""

    name = "refiner"

    def modules(self) -> dict[str, nn.Module]:
        return {"refiner": self.denoiser}

    def loss(self, name: str, engines: Engines, batch: Batch) -> StepOutput:
        x, conditioning = self.clean_data(batch)
        noise = self.sample_noise(batch, self.denoiser)
        losses = engines[name](x, conditioning, noise)
        return StepOutput(losses.mean(), metric_sums({"loss": losses}) | metrics_by_time("loss", losses, noise.t))


@STAGES.register("refiner")
class RefinerStage(TrainStage):
    """Trains the conditional diffusion model."""

    @dataclass(kw_only=True, slots=True)
    class Config(StageConfig):
        """Settings of the stage refiner."""

        train_refiner: TrainingConfig = field(default_factory=TrainingConfig)
        """Training settings of the refiner."""

    after = ("encoder", "prior")
    makes = ("denoiser",)
    parts: ClassVar = {"denoiser": ""}
    takes_streams = True

    def open_task(self, run: Run, name: str) -> RefinerTask:
        models = load_models(run, self.config, "encoder")
        latents = open_latents(run, self.config, models)
        return RefinerTask(models.encoder, models.denoiser, latents, self.training, self.config.seed, default_device())

    def run(self, run: Run) -> None:
        config, task = self.config, self.open_task(run, self.name)
        if config.denoiser.data_scale is None:
            task.denoiser.data_scale.fill_(ranks.on_rank_zero(measure_data_scale, config, task))
        if config.denoiser.pca_components:
            task.denoiser.whitening.fit(ranks.on_rank_zero(latent_moments, run, config, task))
        train_stage(run, config, task, self.parts, self.hooks(run, task))

    def hooks(self, run: Run, task: TrainTask) -> TrainHooks:
        return refiner_hooks(run, self.config)


def refiner_hooks(run: Run, config: RunConfig) -> TrainHooks:
    """Return the hooks that draw samples of the averaged weights, and score them every evaluate.every_steps steps."""
    score_pipeline = online_scorer(run, config)

    def preview(step: int, weights: StateDict) -> Path:
        pipeline, name = build_pipeline(run, config, weights), f"refiner-{step:08d}.png"
        if uses_stream(config):
            return save_points(run, config, pipeline, name)
        return save_samples(run, pipeline, name)

    def score(weights: StateDict) -> dict[str, float]:
        return score_pipeline(build_pipeline(run, config, weights))

    return TrainHooks(preview, score, config.evaluate.every_steps)


@torch.no_grad()
def measure_data_scale(config: RunConfig, task: RefinerTask) -> float:
    """Return 1 / standard deviation of the unscaled clean state, over the first training images of the run."""
    loader = open_loader(config, task.config, task.name, images=task.needs_images, all_ranks=True)
    states = []
    for start in range(0, SCALE_IMAGES, task.config.batch):
        for batch in loader.step(start):
            states.append(task.denoiser.to_state(*task.clean_data(batch)) / task.denoiser.data_scale)
    return float(1.0 / torch.cat(states).std())


def latent_moments(run: Run, config: RunConfig, task: RefinerTask) -> RunningCovariance:
    """Return the moments of the posterior means of all training images, from saved posteriors if they exist."""
    moments = RunningCovariance(math.prod(task.encoder.latent_shape))
    if run.has_weights("posteriors"):
        for means in run.load_weights("posteriors")["mean"].split(SCALE_IMAGES):
            moments.add(means)
        return moments
    shards = open_shards(config, "train")
    for posterior in encode_images(config, task.encoder, shards, 0, len(shards)):
        moments.add(posterior.mean)
    return moments
