"""The stage encoder: train the VAE alone, or adopt weights that were trained elsewhere."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn

from dvae.config.schema import RunConfig, TrainingConfig
from dvae.data.images import to_float, to_uint8
from dvae.data.loading.loader import Batch
from dvae.models import bundle_reuse, components
from dvae.registry.encoders.base import Encoder
from dvae.runs.folder import Run
from dvae.stages.encoder_terms import encoder_losses
from dvae.stages.gan import GanTask
from dvae.stages.previews import preview_images
from dvae.stages.run_models import default_device, export_bundle, load_models
from dvae.stages.train_stage import train_stage
from dvae.tracking import pictures
from dvae.training.loop import PreviewHook, TrainHooks
from dvae.training.metric_sums import metric_sums
from dvae.training.resilience import ranks
from dvae.training.train_task import Engines, StepOutput, TrainTask
from dvae.utils import rng
from dvae.utils.weights import StateDict, fit_weights


class EncoderTask(TrainTask):
    """The VAE alone: reconstruction + KL."""

    name = "encoder"

    def __init__(self, encoder: Encoder, config: TrainingConfig, seed: int, device: torch.device) -> None:
        super().__init__(config, seed, device)
        self.encoder = encoder

    def modules(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder}

    def loss(self, name: str, engines: Engines, batch: Batch) -> StepOutput:
        terms = engines[name](self.images(batch), self.posterior_noise(batch, self.encoder))
        return StepOutput(terms["loss"].mean(), metric_sums(encoder_losses(terms)))


def run_encoder_stage(run: Run, config: RunConfig) -> None:
    models = load_models(run, config)
    pretrained = bundle_reuse.adopted_encoder_weights(config, models.encoder)
    if pretrained is not None:
        ranks.on_rank_zero(adopt_encoder, run, config, models.encoder, pretrained)
        return
    task = build_encoder_task(models.encoder, config)
    train_stage(run, config, task, {"encoder": ""}, TrainHooks(reconstruction_preview(run, config)))


def open_encoder_task(run: Run, config: RunConfig) -> TrainTask:
    """The stage's task, with its modules as they are before the first step."""
    return build_encoder_task(load_models(run, config).encoder, config)


def build_encoder_task(encoder: Encoder, config: RunConfig) -> TrainTask:
    """The task that trains `encoder`. The initial weights of a discriminator are keyed by the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.child(config.seed, "discriminator"))
        adversary = encoder.adversary()
    if adversary is None:
        return EncoderTask(encoder, config.train_encoder, config.seed, default_device())
    return GanTask(encoder, adversary, config.train_encoder, config.seed, default_device())


def reconstruction_preview(run: Run, config: RunConfig) -> PreviewHook:
    """Held-out images above their reconstructions."""
    images = preview_images(config)

    def preview(step: int, weights: StateDict) -> Path:
        encoder = components.build_models(config).encoder
        encoder.load_state_dict(weights)
        encoder.eval().requires_grad_(False)
        x_hat = encoder.decode(encoder.encode(to_float(images)).mean)
        path = run.images / f"encoder-{step:08d}.png"
        pictures.grid(torch.cat([images, to_uint8(x_hat)]), path)
        return path

    return preview


def adopt_encoder(run: Run, config: RunConfig, encoder: Encoder, weights: StateDict) -> None:
    """Save weights that were trained elsewhere as the run's encoder."""
    began = time.perf_counter()
    fit_weights(encoder, weights, "the given encoder")
    run.save_weights("encoder", weights)
    export_bundle(run, config)
    parameters = sum(p.numel() for p in encoder.parameters())
    run.finish("encoder", {"seconds": time.perf_counter() - began, "parameters": parameters})
