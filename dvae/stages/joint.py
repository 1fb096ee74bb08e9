"""The stage joint: encoder and refiner trained end to end, by the sum of their objectives."""

from __future__ import annotations

from collections.abc import Callable
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
from dvae.stages.losses import Engines, Stage, StepOutput, by_time, encoder_figures, sums
from dvae.stages.work import Weights, device, load_models, part_of, preview_images, train_stage
from dvae.tracking import pictures
from dvae.training.loop import TrainHooks

PREFIXES = {"encoder": "encoder.", "denoiser": "denoiser."}


class Joint(nn.Module):
    """Encoder and denoiser, with the sum of their losses."""

    def __init__(self, encoder: Encoder, denoiser: Denoiser, config: JointConfig) -> None:
        super().__init__()
        self.encoder, self.denoiser, self.config = encoder, denoiser, config

    def forward(
        self, x: torch.Tensor, noise: torch.Tensor, label: torch.Tensor | None, noise_sample: NoiseSample, step: int
    ) -> dict[str, torch.Tensor]:
        """Per-sample terms (B,): "loss", the encoder's own, and "refiner"; of images x (B, C, H, W) in step `step`."""
        terms = self.encoder(x, noise)
        x_hat, z = terms["x_hat"].float(), terms["z"].float()
        reaches = self.config.gradient_to if step >= self.config.start else GradientTo.nothing
        conditioning = Conditioning(
            x_hat if reaches in (GradientTo.x_hat, GradientTo.both) else x_hat.detach(),
            z if reaches in (GradientTo.z, GradientTo.both) else z.detach(),
            label,
        )
        refiner = self.denoiser(x, conditioning, noise_sample)
        own = encoder_figures(terms)
        return own | {"encoder": own["loss"], "refiner": refiner, "loss": own["loss"] + self.config.weight * refiner}


class JointStage(Stage):
    """Both at once."""

    name = "joint"

    def __init__(self, joint: Joint, config: TrainingConfig, seed: int, device: torch.device) -> None:
        super().__init__(config, seed, device)
        self.joint = joint

    def modules(self) -> dict[str, nn.Module]:
        return {self.name: self.joint}

    def loss(self, name: str, engines: Engines, batch: Batch) -> StepOutput:
        noise_sample = self.sample_noise(batch, self.joint.denoiser)
        noise = self.posterior_noise(batch, self.joint.encoder)
        step = int(batch.keys[0]) // self.config.batch
        terms = engines[name](self.images(batch), noise, self.labels(batch), noise_sample, step)
        return StepOutput(terms["loss"].mean(), sums(terms) | by_time("loss", terms["refiner"], noise_sample.t))


def joint_stage(run: Run, config: RunConfig) -> None:
    """Trains the run's encoder and refiner; the prior is fitted afterwards."""
    train_stage(run, config, open_joint(run, config), config.train_joint, PREFIXES, TrainHooks(previews(run, config)))


def open_joint(run: Run, config: RunConfig) -> JointStage:
    """The stage as it is before the first step."""
    made = load_models(run, config)
    joint = Joint(made.encoder, made.denoiser, config.joint)
    return JointStage(joint, config.train_joint, config.seed, device())


def previews(run: Run, config: RunConfig) -> Callable[[int, Weights], Path]:
    """Held-out images, above their x_hat and what is refined of it."""
    shown = preview_images(config)

    def preview(step: int, averaged: Weights) -> Path:
        copy = components.build_models(config)
        for name, prefix in PREFIXES.items():
            part = copy.trained_parts()[name]
            part.load_state_dict(part_of(averaged, prefix))
            part.eval().requires_grad_(False)
        x_hat, refined = Pipeline(model_config(config), copy, config.evaluate.batch).reconstruct(shown)
        path = run.images / f"joint-{step:08d}.png"
        pictures.grid(torch.cat([shown, x_hat, *([] if refined is None else [refined])]), path)
        return path

    return preview
