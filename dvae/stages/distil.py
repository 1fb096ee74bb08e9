"""The stage distil: train students that sample in few steps, from a teacher that needs many steps.

The methods are in registry/distillers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dvae.config.schema import TrainingConfig
from dvae.data.loading.loader import Batch
from dvae.diffusion.conditioning import Conditioning
from dvae.diffusion.denoiser import Denoiser
from dvae.errors import UserError
from dvae.models import bundle_reuse, components
from dvae.models.components import RunModels
from dvae.registry.distillers.base import DISTILLERS, Distiller
from dvae.registry.encoders.base import Encoder
from dvae.registry.stages.base import STAGES, StageConfig, settings_of
from dvae.runs.folder import Run
from dvae.stages.base import TrainStage
from dvae.stages.latent_sources import LatentSource, open_latents
from dvae.stages.noisy_task import NoisyTask
from dvae.stages.previews import build_pipeline, save_samples
from dvae.stages.run_models import default_device, export_bundle, load_models
from dvae.stages.train_stage import train_stage
from dvae.training.loop import TrainHooks
from dvae.training.metric_sums import metric_sums, metrics_by_time
from dvae.training.resilience import ranks
from dvae.training.train_task import Engines, StepOutput, TrainTask
from dvae.utils import rng
from dvae.utils.weights import StateDict, fit_weights, part_of

STUDENT = "denoiser"
"""Name of the submodule of StudentModel that is saved."""


class StudentModel(nn.Module):
    """The student's denoiser, with the loss of the distillation."""

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
        """Return the loss per sample (B,) at the noisy state u_t = alpha_t y0 + sigma_t eps.

        Args:
            y0: Clean states (B, C, H, W).
            eps: Standard normal noise (B, C, H, W).
            t: Times of the noisy states (B,).
            s: Times (B,), s < t, that `Distiller.times` draws together with t.
            conditioning: Conditioning of the samples.
            target: Clean state (B, C, H, W) to predict. None: the student computes it, with the same dropout masks.
        """
        diffusion = self.denoiser.diffusion
        if target is None:
            # fork_rng restores the random state, so that the prediction below uses the same dropout masks.
            with torch.no_grad(), torch.random.fork_rng():
                target = self.distiller.target(self.denoiser, y0, eps, t, s, conditioning)
        predicted = self.denoiser.predict(diffusion.perturb(y0, t, eps), t, conditioning)[1]
        return self.distiller.loss(diffusion, predicted - target, t, s)


class DistilTask(NoisyTask):
    """One round of the distillation: a student that samples in `steps` steps, and a frozen teacher."""

    def __init__(
        self,
        name: str,
        student: StudentModel,
        teacher: Denoiser,
        steps: int,
        encoder: Encoder,
        latents: LatentSource,
        config: TrainingConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__(encoder, teacher.eval().requires_grad_(False), latents, config, seed, device)
        self.name, self.student, self.steps = name, student, steps

    def modules(self) -> dict[str, nn.Module]:
        return {self.name: self.student}

    def loss(self, name: str, engines: Engines, batch: Batch) -> StepOutput:
        x, conditioning = self.clean_data(batch)
        teacher, distiller, keys = self.denoiser, self.student.distiller, batch.keys.tolist()
        y0 = teacher.to_state(x, conditioning)
        eps = self.to_device(rng.normal(self.seed, "noise", keys, tuple(y0.shape[1:])))
        progress = (batch.keys // self.config.batch).double() / self.config.steps
        t, s = distiller.times(teacher.diffusion, self.steps, rng.uniform(self.seed, "time", keys), progress)
        target = None
        if not distiller.targets_from_student:
            with torch.no_grad(), self.autocast():
                target = distiller.target(teacher, y0, eps, t, s, conditioning)
        losses = engines[name](y0, eps, t, s, conditioning, target)
        return StepOutput(losses.mean(), metric_sums({"loss": losses}) | metrics_by_time("loss", losses, t))


@STAGES.register("distil")
class DistilStage(TrainStage):
    """Trains students that sample in few steps, from a trained run. The last student is the run's refiner."""

    @dataclass(kw_only=True, slots=True)
    class Config(StageConfig):
        """Settings of the stage distil."""

        teacher: str = ""
        """Run folder or bundle of the teacher. The students start from its trained models."""
        distiller: Any = None
        """The distiller, the method of distillation: `python tools/components.py distiller` lists them."""
        train_distil: TrainingConfig = field(default_factory=TrainingConfig)
        """Training settings of each round of the distiller."""

    after, before = ("refiner", "classifier"), ("evaluate",)
    makes = ("encoder", "prior", "denoiser")
    takes_streams = True

    @property
    def settings(self) -> Config:
        return settings_of(self.config, self.Config)

    def check_settings(self) -> None:
        if self.settings.distiller is None:
            raise UserError(f"stages: {self.name} needs a distiller: set distiller=consistency or progressive")
        if not self.settings.teacher:
            raise UserError(
                f"stages: {self.name} needs a trained teacher: set teacher=RUN, the folder of a finished run"
            )

    def check(self, models: RunModels) -> None:
        self.distiller(models).check(models.denoiser)
        self.load_teacher()  # raises UserError if the teacher is missing, or has other networks

    def distiller(self, models: RunModels) -> Distiller:
        return DISTILLERS.build(self.settings.distiller, models.denoiser.shapes)

    def load_teacher(self) -> RunModels:
        return bundle_reuse.load_teacher(self.settings.teacher, self.config)

    def describe(self, models: RunModels) -> str:
        rounds = " -> ".join(map(str, self.distiller(models).rounds))
        return f"for {rounds} steps, {self.training.steps} steps of {self.training.batch} images each"

    def rounds(self) -> dict[str, int]:
        """Return the number of sampling steps of each round's student, by the name of the round."""
        rounds = self.distiller(components.build_models_on_meta(self.config)).rounds
        return {f"{self.name}-{steps}": steps for steps in rounds}

    def trainings(self) -> list[str]:
        return [] if self.settings.distiller is None else list(self.rounds())

    def run(self, run: Run) -> None:
        """Train the students of all unfinished rounds. The last student becomes the run's refiner."""
        config, names = self.config, self.trainings()
        ranks.on_rank_zero(self.save_teacher, run)
        for name in names:
            if name not in ranks.on_rank_zero(run.records):
                task = self.open_task(run, name)
                train_stage(run, config, task, {name: STUDENT}, self.hooks(run, task))

        def finish() -> None:
            run.save_weights("denoiser", run.load_weights(names[-1]))
            export_bundle(run, config)
            records = run.records()
            run.finish(self.name, {"seconds": sum(records[name]["seconds"] for name in names)})

        ranks.on_rank_zero(finish)

    def save_teacher(self, run: Run) -> None:
        """Save the teacher's weights in the run: encoder and prior as the run's own, the denoiser as "teacher"."""
        if run.has_weights("teacher"):  # it is saved last, so all other parts are there too
            return
        for part, module in self.load_teacher().trained_parts().items():
            run.save_weights("teacher" if part == "denoiser" else part, module.state_dict())

    def open_task(self, run: Run, name: str) -> DistilTask:
        """Return the task of the round `name`, before its first step. The student starts with the teacher's weights."""
        config, rounds = self.config, self.rounds()
        models = load_models(run, config, "encoder")
        before = ["teacher", *rounds][list(rounds).index(name)]
        distiller = self.distiller(models)
        weights = run.load_weights(before)
        teacher = components.build_models(config).denoiser
        for denoiser in (models.denoiser, teacher):
            distiller.check(denoiser)
            fit_weights(denoiser, weights, str(run.weights(before)))
            denoiser.to(default_device())
        student, latents = StudentModel(models.denoiser, distiller), open_latents(run, config, models)
        return DistilTask(
            name, student, teacher, rounds[name], models.encoder, latents, self.training, config.seed, default_device()
        )

    def hooks(self, run: Run, task: TrainTask) -> TrainHooks:
        """Return hooks that draw previews: samples of the averaged student in its round's number of steps."""
        name, steps = task.name, self.rounds()[task.name]

        def preview(step: int, weights: StateDict) -> Path:
            pipeline = build_pipeline(run, self.config, part_of(weights, STUDENT))
            pipeline.use_sampler(steps=steps)
            return save_samples(run, pipeline, f"{name}-{step:08d}.png")

        return TrainHooks(preview)
