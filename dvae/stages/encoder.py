"""The stage encoder: train the VAE, or load weights that were trained elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from dvae.config.schema import RunConfig, TrainingConfig
from dvae.data.images import to_float, to_uint8
from dvae.data.loading.loader import Batch
from dvae.errors import UserError
from dvae.models import bundle_reuse, components
from dvae.models.components import RunModels
from dvae.registry.encoders.base import Encoder
from dvae.registry.stages.base import STAGES, StageConfig, settings_of
from dvae.runs.folder import Run
from dvae.stages.base import TrainStage
from dvae.stages.encoder_terms import encoder_losses
from dvae.stages.gan import GanTask
from dvae.stages.previews import preview_images
from dvae.stages.run_models import default_device, export_bundle, load_models
from dvae.tracking import pictures
from dvae.training.loop import PreviewHook, TrainHooks
from dvae.training.metric_sums import metric_sums
from dvae.training.resilience import ranks
from dvae.training.train_task import Engines, StepOutput, TrainTask
from dvae.utils import rng
from dvae.utils.weights import StateDict, fit_weights


class EncoderTask(TrainTask):
    """The task that trains the VAE: reconstruction error + KL divergence."""

    name = "encoder"

    def __init__(self, encoder: Encoder, config: TrainingConfig, seed: int, device: torch.device) -> None:
        super().__init__(config, seed, device)
        self.encoder = encoder

    def modules(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder}

    def loss(self, name: str, engines: Engines, batch: Batch) -> StepOutput:
        terms = engines[name](self.images(batch), self.posterior_noise(batch, self.encoder))
        return StepOutput(terms["loss"].mean(), metric_sums(encoder_losses(terms)))


@STAGES.register("encoder")
class EncoderStage(TrainStage):
    """Trains the VAE, or loads weights that were trained elsewhere."""

    @dataclass(kw_only=True, slots=True)
    class Config(StageConfig):
        """Settings of the stage encoder."""

        encoder_weights: str = ""
        """Run folder or bundle whose trained encoder is used, instead of training one (empty: train)."""
        train_encoder: TrainingConfig = field(default_factory=TrainingConfig)
        """Training settings of the encoder."""

    after = ("shards",)
    makes = ("encoder",)
    parts: ClassVar = {"encoder": ""}

    @property
    def settings(self) -> Config:
        return settings_of(self.config, self.Config)

    def adopted_weights(self, encoder: Encoder) -> StateDict | None:
        """Return the weights that are used instead of training `encoder`, or None if it is trained.

        Raises UserError if the weights cannot be read or do not fit.
        """
        folder = self.settings.encoder_weights
        return bundle_reuse.load_encoder_weights(folder, self.config) if folder else encoder.pretrained()

    def refuse_unused_weights(self) -> None:
        """Raise UserError if encoder_weights is set, but no stage of the run loads these weights."""
        folder, config = self.settings.encoder_weights, self.config
        made = any("encoder" in STAGES.get(name).makes for name in config.stages)
        if folder and not made and not Run(Path(config.run)).weights("encoder").exists():
            raise UserError(
                f"encoder_weights={folder} is loaded by the stage encoder, which this run does not have: "
                "add encoder to stages=[...]"
            )

    def check(self, models: RunModels) -> None:
        if not models.parameters()["encoder"]:
            name = self.config.encoder.name
            raise UserError(f"stages: encoder={name} has nothing to train: leave encoder and prior out")
        self.adopted_weights(models.encoder)  # raises UserError for weights that do not fit

    def describe(self, models: RunModels) -> str:
        if self.adopted_weights(models.encoder) is None:
            return super().describe(models)
        return f"{models.parameters()['encoder'] / 1e6:.1f}M parameters, loaded and not trained"

    def open_task(self, run: Run, name: str) -> TrainTask:
        return build_encoder_task(load_models(run, self.config).encoder, self.config)

    def hooks(self, run: Run, task: TrainTask) -> TrainHooks:
        return TrainHooks(reconstruction_preview(run, self.config))

    def run(self, run: Run) -> None:
        encoder = load_models(run, self.config).encoder
        pretrained = self.adopted_weights(encoder)
        if pretrained is None:
            super().run(run)
        else:
            ranks.on_rank_zero(adopt_encoder, run, self.config, encoder, pretrained)


def build_encoder_task(encoder: Encoder, config: RunConfig) -> TrainTask:
    """Return the task that trains `encoder`. The run's seed determines the initial weights of a discriminator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.child(config.seed, "discriminator"))
        adversary = encoder.adversary()
    if adversary is None:
        return EncoderTask(encoder, config.training("encoder"), config.seed, default_device())
    return GanTask(encoder, adversary, config.training("encoder"), config.seed, default_device())


def reconstruction_preview(run: Run, config: RunConfig) -> PreviewHook:
    """Return the hook that draws held-out images above their reconstructions."""
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
    """Save weights that were trained elsewhere as the run's encoder, and record the stage as finished.

    Raises UserError if the weights do not fit.
    """
    began = time.perf_counter()
    fit_weights(encoder, weights, "the given encoder")
    run.save_weights("encoder", weights)
    export_bundle(run, config)
    parameters = sum(p.numel() for p in encoder.parameters())
    run.finish("encoder", {"seconds": time.perf_counter() - began, "parameters": parameters})
