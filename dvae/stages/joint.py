"""The stage joint: train encoder and refiner end to end, with the sum of their losses."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from dvae.config.model_config import model_config
from dvae.config.schema import TrainingConfig
from dvae.data.loading.loader import Batch
from dvae.diffusion.conditioning import Conditioning, NoiseSample
from dvae.diffusion.denoiser import Denoiser, Space
from dvae.errors import UserError
from dvae.inference.pipeline import Pipeline
from dvae.models import components
from dvae.models.components import RunModels
from dvae.registry.encoders.base import Encoder
from dvae.registry.stages.base import STAGES, StageConfig, settings_of
from dvae.runs.folder import Run
from dvae.stages.base import TrainStage
from dvae.stages.encoder_terms import encoder_losses
from dvae.stages.previews import preview_images
from dvae.stages.run_models import default_device, load_models
from dvae.tracking import pictures
from dvae.training.loop import PreviewHook, TrainHooks
from dvae.training.metric_sums import metric_sums, metrics_by_time
from dvae.training.train_task import Engines, StepOutput, TrainTask
from dvae.utils.weights import StateDict, part_of


class GradientTo(Enum):
    """The inputs of the refiner through which the gradient of its loss reaches the encoder."""

    nothing = "nothing"
    z = "z"
    x_hat = "x_hat"
    both = "both"


@dataclass(kw_only=True, slots=True)
class JointConfig:
    """Settings of the sum of the losses of encoder and refiner."""

    weight: float = 1.0
    """Factor on the refiner's loss, above 0. This loss is a mean over pixels; the encoder's loss is a sum over them."""
    gradient_to: GradientTo = GradientTo.both
    """nothing | z | x_hat | both: inputs of the refiner through which the gradient of its loss reaches the encoder."""
    start: int = 0
    """Number of initial steps in which this gradient does not reach the encoder."""


class JointModel(nn.Module):
    """An encoder and a denoiser, with the sum of their losses."""

    def __init__(self, encoder: Encoder, denoiser: Denoiser, config: JointConfig) -> None:
        super().__init__()
        self.encoder, self.denoiser, self.config = encoder, denoiser, config

    def forward(
        self,
        x: torch.Tensor,
        posterior_noise: torch.Tensor,
        label: torch.Tensor | None,
        noise: NoiseSample,
        step: int,
    ) -> dict[str, torch.Tensor]:
        """Return the losses per sample, each (B,).

        "loss" is "encoder" + weight * "refiner". "encoder" is the encoder's total loss, and its other terms keep their
        names.

        Args:
            x: Images (B, C, H, W).
            posterior_noise: Standard normal noise (B, *latent), for the sample of z.
            label: Class numbers (B,), or None.
            noise: Times and noise of the diffusion.
            step: Number of steps taken so far.
        """
        terms = self.encoder(x, posterior_noise)
        x_hat, z = terms["x_hat"].float(), terms["z"].float()
        gradient_to = self.config.gradient_to if step >= self.config.start else GradientTo.nothing
        conditioning = Conditioning(
            x_hat if gradient_to in (GradientTo.x_hat, GradientTo.both) else x_hat.detach(),
            z if gradient_to in (GradientTo.z, GradientTo.both) else z.detach(),
            label,
        )
        refiner = self.denoiser(x, conditioning, noise)
        encoder = encoder_losses(terms)
        loss = encoder["loss"] + self.config.weight * refiner
        return encoder | {"encoder": encoder["loss"], "refiner": refiner, "loss": loss}


class JointTask(TrainTask):
    """The task that trains encoder and refiner together."""

    def __init__(self, name: str, joint: JointModel, config: TrainingConfig, seed: int, device: torch.device) -> None:
        super().__init__(config, seed, device)
        self.name, self.joint = name, joint

    def modules(self) -> dict[str, nn.Module]:
        return {self.name: self.joint}

    def loss(self, name: str, engines: Engines, batch: Batch) -> StepOutput:
        noise = self.sample_noise(batch, self.joint.denoiser)
        posterior_noise = self.posterior_noise(batch, self.joint.encoder)
        step = int(batch.keys[0]) // self.config.batch
        terms = engines[name](self.images(batch), posterior_noise, self.labels(batch), noise, step)
        return StepOutput(terms["loss"].mean(), metric_sums(terms) | metrics_by_time("loss", terms["refiner"], noise.t))


@STAGES.register("joint")
class JointStage(TrainStage):
    """Trains encoder and refiner end to end. The prior is fitted afterwards."""

    @dataclass(kw_only=True, slots=True)
    class Config(StageConfig):
        """Settings of the stage joint."""

        joint: JointConfig = field(default_factory=JointConfig)
        """Settings of the sum of the losses."""
        train_joint: TrainingConfig = field(default_factory=TrainingConfig)
        """Training settings of encoder and refiner."""

    after, before = ("shards", "encoder"), ("prior",)
    makes = ("encoder", "denoiser")
    parts: ClassVar = {"encoder": "encoder", "denoiser": "denoiser"}

    @property
    def settings(self) -> JointConfig:
        return settings_of(self.config, self.Config).joint

    def check_settings(self) -> None:
        config = self.config
        apart = [name for name in ("encoder", "cache", "refiner") if name in config.stages]
        if apart:
            raise UserError(f"stages: joint trains encoder and refiner together: leave {apart[0]} out")
        if config.denoiser.space is Space.latent:
            raise UserError("stages: joint changes the latent space while the refiner trains: set denoiser.space=pixel")
        if config.denoiser.data_scale is None:
            raise UserError(
                "denoiser.data_scale=null is measured with a trained encoder, which stage joint lacks: set a number"
            )
        if not self.settings.weight > 0.0:
            raise UserError(f"joint.weight={self.settings.weight:g}: use more than 0")

    def check(self, models: RunModels) -> None:
        if not models.parameters()["encoder"] or models.encoder.adversary() is not None:
            name = self.config.encoder.name
            raise UserError(f"stages: joint needs an encoder to train without a discriminator, not {name}")

    def open_task(self, run: Run, name: str) -> JointTask:
        models = load_models(run, self.config)
        joint = JointModel(models.encoder, models.denoiser, self.settings)
        return JointTask(name, joint, self.training, self.config.seed, default_device())

    def hooks(self, run: Run, task: TrainTask) -> TrainHooks:
        return TrainHooks(self.refinement_preview(run))

    def refinement_preview(self, run: Run) -> PreviewHook:
        """Return the hook that draws held-out images above their reconstructions x_hat and the refined x_hat."""
        config, images = self.config, preview_images(self.config)

        def preview(step: int, weights: StateDict) -> Path:
            models = components.build_models(config)
            for name, submodule in self.parts.items():
                part = models.trained_parts()[name]
                part.load_state_dict(part_of(weights, submodule))
                part.eval().requires_grad_(False)
            x_hat, refined = Pipeline(model_config(config), models, config.evaluate.batch).reconstruct(images)
            path = run.images / f"{self.name}-{step:08d}.png"
            pictures.grid(torch.cat([images, x_hat, *([] if refined is None else [refined])]), path)
            return path

        return preview
