"""The stage joint: encoder and refiner trained end to end, by the sum of their objectives."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dvae.config.model_config import model_config
from dvae.config.schema import GradientTo, JointConfig, RunConfig, TrainingConfig
from dvae.data.loading.loader import Batch
from dvae.diffusion.conditioning import Conditioning, NoiseSample
from dvae.diffusion.denoiser import Denoiser
from dvae.inference.pipeline import Pipeline
from dvae.models import components
from dvae.registry.encoders.base import Encoder
from dvae.runs.folder import Run
from dvae.stages.encoder_terms import encoder_losses
from dvae.stages.previews import preview_images
from dvae.stages.run_models import default_device, load_models
from dvae.stages.train_stage import train_stage
from dvae.tracking import pictures
from dvae.training.loop import PreviewHook, TrainHooks
from dvae.training.metric_sums import metric_sums, metrics_by_time
from dvae.training.train_task import Engines, StepOutput, TrainTask
from dvae.utils.weights import StateDict, part_of

PARTS = {"encoder": "encoder", "denoiser": "denoiser"}
"""Part of the bundle -> submodule of JointModel."""


class JointModel(nn.Module):
    """Encoder and denoiser, with the sum of their losses."""

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
        """Per-sample terms (B,) of images x (B, C, H, W) in step `step`: "loss", the encoder's own, and "refiner"."""
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
    """Encoder and refiner at once."""

    name = "joint"

    def __init__(self, joint: JointModel, config: TrainingConfig, seed: int, device: torch.device) -> None:
        super().__init__(config, seed, device)
        self.joint = joint

    def modules(self) -> dict[str, nn.Module]:
        return {self.name: self.joint}

    def loss(self, name: str, engines: Engines, batch: Batch) -> StepOutput:
        noise = self.sample_noise(batch, self.joint.denoiser)
        posterior_noise = self.posterior_noise(batch, self.joint.encoder)
        step = int(batch.keys[0]) // self.config.batch
        terms = engines[name](self.images(batch), posterior_noise, self.labels(batch), noise, step)
        return StepOutput(terms["loss"].mean(), metric_sums(terms) | metrics_by_time("loss", terms["refiner"], noise.t))


def run_joint_stage(run: Run, config: RunConfig) -> None:
    """Train the run's encoder and refiner. The prior is fitted afterwards."""
    task = open_joint_task(run, config)
    train_stage(run, config, task, PARTS, TrainHooks(refinement_preview(run, config)))


def open_joint_task(run: Run, config: RunConfig) -> JointTask:
    """The stage's task, with its modules as they are before the first step."""
    models = load_models(run, config)
    joint = JointModel(models.encoder, models.denoiser, config.joint)
    return JointTask(joint, config.train_joint, config.seed, default_device())


def refinement_preview(run: Run, config: RunConfig) -> PreviewHook:
    """Held-out images above their reconstructions x_hat and the refined ones."""
    images = preview_images(config)

    def preview(step: int, weights: StateDict) -> Path:
        models = components.build_models(config)
        for name, submodule in PARTS.items():
            part = models.trained_parts()[name]
            part.load_state_dict(part_of(weights, submodule))
            part.eval().requires_grad_(False)
        x_hat, refined = Pipeline(model_config(config), models, config.evaluate.batch).reconstruct(images)
        path = run.images / f"joint-{step:08d}.png"
        pictures.grid(torch.cat([images, x_hat, *([] if refined is None else [refined])]), path)
        return path

    return preview
