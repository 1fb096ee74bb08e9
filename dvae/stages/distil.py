"""The stage distil: a student learns to draw in few steps what a trained run draws in many (registry/distillers)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dvae.config.schema import RunConfig, TrainingConfig
from dvae.data.loading.loader import Batch
from dvae.diffusion.conditioning import Conditioning
from dvae.diffusion.denoiser import Denoiser
from dvae.models import bundle_reuse, components
from dvae.registry.distillers.base import DISTILLERS, Distiller
from dvae.registry.encoders.base import Encoder
from dvae.runs.folder import Run
from dvae.stages.cache import open_latents
from dvae.stages.latent_sources import Latents
from dvae.stages.losses import Engines, NoisyStage, StepOutput, by_time, sums
from dvae.stages.work import Weights, device, export, load_models, part_of, pipeline_of, preview_samples, train_stage
from dvae.training.loop import TrainHooks
from dvae.training.resilience import ranks
from dvae.utils import rng
from dvae.utils.weights import fit_weights

STUDENT = "denoiser."
"""Before the names of a student's weights in those of what is trained."""


class Student(nn.Module):
    """A denoiser with the loss of its distillation."""

    def __init__(self, denoiser: Denoiser, distiller: Distiller) -> None:
        super().__init__()
        self.denoiser, self.distiller = denoiser, distiller

    def forward(
        self,
        y0: torch.Tensor,
        eps: torch.Tensor,
        t: torch.Tensor,
        s: torch.Tensor,
        conditioning: Conditioning,
        target: torch.Tensor | None,
    ) -> torch.Tensor:
        """Per-sample loss (B,) at u_t = alpha_t y0 + sigma_t eps, (B, C, H, W); without a target it is the student's
        own, with the same units dropped."""
        diffusion = self.denoiser.diffusion
        if target is None:
            with torch.no_grad(), torch.random.fork_rng():
                target = self.distiller.target(self.denoiser, y0, eps, t, s, conditioning)
        seen = self.denoiser.predict(diffusion.perturb(y0, t, eps), t, conditioning)[1]
        return self.distiller.loss(diffusion, seen - target, t, s)


class DistilStage(NoisyStage):
    """One round: a student for so many steps, of a teacher that stays as it is."""

    def __init__(
        self,
        student: Student,
        teacher: Denoiser,
        steps: int,
        encoder: Encoder,
        latents: Latents,
        config: TrainingConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__(encoder, teacher.eval().requires_grad_(False), latents, config, seed, device)
        self.name = f"distil-{steps}"
        self.student, self.steps = student, steps

    def modules(self) -> dict[str, nn.Module]:
        return {self.name: self.student}

    def loss(self, name: str, engines: Engines, batch: Batch) -> StepOutput:
        x, conditioning = self.example(batch)
        teacher, distiller, numbers = self.denoiser, self.student.distiller, batch.keys.tolist()
        y0 = teacher.to_state(x, conditioning)
        eps = self.place(rng.normal(self.seed, "noise", numbers, tuple(y0.shape[1:])))
        done = (batch.keys // self.config.batch).double() / self.config.steps
        t, s = distiller.times(teacher.diffusion, self.steps, rng.uniform(self.seed, "time", numbers), done)
        target = None
        if not distiller.by_itself:
            with torch.no_grad(), self.autocast():
                target = distiller.target(teacher, y0, eps, t, s, conditioning)
        losses = engines[name](y0, eps, t, s, conditioning, target)
        return StepOutput(losses.mean(), sums({"loss": losses}) | by_time("loss", losses, t))


def distil_stage(run: Run, config: RunConfig) -> None:
    """All rounds, each once; at the end the last student is the run's refiner."""
    ranks.on_rank_zero(take_teacher, run, config)
    names = list(round_names(config))
    for name in names:
        if name not in ranks.on_rank_zero(run.records):
            stage = open_distil(run, config, name)
            looks = previews(run, config, name, stage.steps)
            train_stage(run, config, stage, config.train_distil, {name: STUDENT}, looks)

    def finish() -> None:
        run.save_weights("denoiser", run.load_weights(names[-1]))
        export(run, config)
        records = run.records()
        run.finish("distil", {"seconds": sum(records[name]["seconds"] for name in names)})

    ranks.on_rank_zero(finish)


def take_teacher(run: Run, config: RunConfig) -> None:
    """Keep what the run shares with its teacher, and the teacher's refiner."""
    if run.has_weights("teacher"):  # the last that is kept
        return
    for part, module in bundle_reuse.load_teacher(config).trained_parts().items():
        run.save_weights("teacher" if part == "denoiser" else part, module.state_dict())


def round_names(config: RunConfig) -> dict[str, int]:
    """The rounds' names, and the steps that the student of each is for."""
    rounds = DISTILLERS.build(config.distiller, components.build_models_on_meta(config).denoiser.io).rounds
    return {f"distil-{steps}": steps for steps in rounds}


def open_distil(run: Run, config: RunConfig, name: str) -> DistilStage:
    """The round that is called `name`, as it is before the first step: its teacher and start are those before it."""
    made, rounds = load_models(run, config, "encoder"), round_names(config)
    steps, before = rounds[name], ["teacher", *rounds][list(rounds).index(name)]
    distiller = DISTILLERS.build(config.distiller, made.denoiser.io)
    weights = run.load_weights(before)
    teacher = components.build_models(config).denoiser
    for denoiser in (made.denoiser, teacher):
        distiller.check(denoiser)
        fit_weights(denoiser, weights, str(run.weights(before)))
        denoiser.to(device())
    student, latents = Student(made.denoiser, distiller), open_latents(run, config, made)
    return DistilStage(student, teacher, steps, made.encoder, latents, config.train_distil, config.seed, device())


def previews(run: Run, config: RunConfig, name: str, steps: int) -> TrainHooks:
    """Pictures of what the averaged student draws in as many steps as its round is for."""

    def preview(step: int, averaged: Weights) -> Path:
        pipeline = pipeline_of(run, config, part_of(averaged, STUDENT))
        pipeline.use_sampler(steps=steps)
        return preview_samples(run, pipeline, f"{name}-{step:08d}.png")

    return TrainHooks(preview)
