"""The stage classifier: train a classifier of noisy states, for guidance (Dhariwal & Nichol 2021, section 4)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from dvae.config.schema import TrainingConfig
from dvae.data.loading.loader import Batch, Batches
from dvae.diffusion.denoiser import Denoiser
from dvae.errors import UserError
from dvae.registry.classifiers.base import Classifier
from dvae.registry.encoders.base import Encoder
from dvae.registry.stages.base import STAGES, StageConfig
from dvae.runs.folder import Run
from dvae.stages.base import TrainStage
from dvae.stages.latent_sources import EncodedLatents, LatentSource, open_latents
from dvae.stages.noisy_task import NoisyTask
from dvae.stages.run_models import default_device, load_models
from dvae.stages.train_stage import train_stage
from dvae.training.batches import open_loader
from dvae.training.metric_sums import add_metric_sums, metric_means, metric_sums, metrics_by_time
from dvae.training.train_task import Engines, StepOutput
from dvae.utils import rng
from dvae.utils.weights import StateDict

HELDOUT_SAMPLES = 1024
"""Minimum number of noisy states of held-out images on which a trained classifier is tested."""


class ClassifierTask(NoisyTask):
    """The task that trains the classifier: cross-entropy on noisy states of the refiner's diffusion."""

    name = "classifier"

    def __init__(
        self,
        classifier: Classifier,
        encoder: Encoder,
        denoiser: Denoiser,
        latents: LatentSource,
        config: TrainingConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__(encoder, denoiser.eval().requires_grad_(False), latents, config, seed, device)
        self.classifier = classifier

    def modules(self) -> dict[str, nn.Module]:
        return {"classifier": self.classifier}

    def loss(self, name: str, engines: Engines, batch: Batch) -> StepOutput:
        x, conditioning = self.clean_data(batch)
        noise = self.sample_noise(batch, self.denoiser)
        assert conditioning.label is not None
        with torch.no_grad():
            u = self.denoiser.add_noise(x, conditioning, noise)  # the condition is never dropped here
            feature = self.denoiser.diffusion.schedule.time_feature(noise.t).to(self.device, torch.float32)
        logits = engines[name](u, feature, self.denoiser.build_condition(conditioning))
        losses = F.cross_entropy(logits, conditioning.label, reduction="none")
        metrics = {"loss": losses, "accuracy": (logits.argmax(1) == conditioning.label).float()}
        sums = metric_sums(metrics)
        for metric, values in metrics.items():
            sums |= metrics_by_time(metric, values, noise.t)
        return StepOutput(losses.mean(), sums)


@STAGES.register("classifier")
class ClassifierStage(TrainStage):
    """Trains a classifier of noisy states, for guidance."""

    @dataclass(kw_only=True, slots=True)
    class Config(StageConfig):
        """Settings of the stage classifier."""

        train_classifier: TrainingConfig = field(default_factory=TrainingConfig)
        """Training settings of the classifier. preview_every has no effect."""

    after = ("refiner",)
    makes = ("classifier",)
    parts: ClassVar = {"classifier": ""}
    takes_streams = True

    def check_settings(self) -> None:
        if self.config.classifier is None:
            raise UserError("stages: classifier trains a classifier, and classifier=null: set classifier=half_unet")

    def open_task(self, run: Run, name: str) -> ClassifierTask:
        models = load_models(run, self.config, "encoder", "denoiser")
        assert models.classifier is not None
        latents = open_latents(run, self.config, models)
        return self.task_of(models.classifier, models.encoder, models.denoiser, latents, self.config.seed)

    def task_of(
        self, classifier: Classifier, encoder: Encoder, denoiser: Denoiser, latents: LatentSource, seed: int
    ) -> ClassifierTask:
        return ClassifierTask(classifier, encoder, denoiser, latents, self.training, seed, default_device())

    def run(self, run: Run) -> None:
        config, task = self.config, self.open_task(run, self.name)
        classifier, encoder = task.classifier, task.encoder
        seed = rng.child(config.seed, "held-out")
        heldout_task = self.task_of(classifier, encoder, task.denoiser, EncodedLatents(encoder), seed)

        with open_loader(config, self.training, "classifier held-out", "heldout", all_ranks=True) as heldout:

            def final_metrics(weights: StateDict) -> dict[str, float]:
                classifier.load_state_dict(weights)
                return heldout_accuracy(heldout_task, heldout)

            train_stage(run, config, task, self.parts, self.hooks(run, task), final_metrics)


@torch.no_grad()
def heldout_accuracy(task: ClassifierTask, heldout: Batches) -> dict[str, float]:
    """Compute the accuracy on noisy states of held-out images, overall and for each tenth of t in [0, 1]."""
    task.classifier.eval()
    batches = (batch for start in range(0, HELDOUT_SAMPLES, task.config.batch) for batch in heldout.step(start))
    means = metric_means(add_metric_sums(task.loss("classifier", task.modules(), batch).metrics for batch in batches))
    return {f"heldout_{name}": value for name, value in means.items() if name.startswith("accuracy")}
