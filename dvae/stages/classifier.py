"""The stage classifier: train a classifier of noisy states, for guidance (Dhariwal & Nichol 2021, section 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dvae.config.schema import RunConfig, TrainingConfig
from dvae.data.loading.loader import Batch, Batches
from dvae.diffusion.denoiser import Denoiser
from dvae.registry.classifiers.base import Classifier
from dvae.registry.encoders.base import Encoder
from dvae.runs.folder import Run
from dvae.stages.latent_sources import EncodedLatents, LatentSource, open_latents
from dvae.stages.noisy_task import NoisyTask
from dvae.stages.run_models import default_device, load_models
from dvae.stages.train_stage import train_stage
from dvae.training.batches import open_loader
from dvae.training.loop import TrainHooks
from dvae.training.metric_sums import add_metric_sums, metric_means, metric_sums, metrics_by_time
from dvae.training.train_task import Engines, StepOutput
from dvae.utils import rng
from dvae.utils.weights import StateDict

HELDOUT_SAMPLES = 1024
"""Noisy states of held-out images on which a trained classifier is tested."""


class ClassifierTask(NoisyTask):
    """The classifier's cross-entropy on states of the refiner's diffusion."""

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


def run_classifier_stage(run: Run, config: RunConfig) -> None:
    task, training = open_classifier_task(run, config), config.train_classifier
    classifier, encoder = task.classifier, task.encoder
    seed = rng.child(config.seed, "held-out")
    heldout_task = ClassifierTask(
        classifier, encoder, task.denoiser, EncodedLatents(encoder), training, seed, default_device()
    )

    with open_loader(config, training, "classifier held-out", "heldout", all_ranks=True) as heldout:

        def final_metrics(weights: StateDict) -> dict[str, float]:
            classifier.load_state_dict(weights)
            return heldout_accuracy(heldout_task, heldout)

        train_stage(run, config, task, {"classifier": ""}, TrainHooks(), final_metrics)


def open_classifier_task(run: Run, config: RunConfig) -> ClassifierTask:
    """The stage's task, with its modules as they are before the first step."""
    models = load_models(run, config, "encoder", "denoiser")
    assert models.classifier is not None
    latents, training = open_latents(run, config, models), config.train_classifier
    return ClassifierTask(
        models.classifier, models.encoder, models.denoiser, latents, training, config.seed, default_device()
    )


@torch.no_grad()
def heldout_accuracy(task: ClassifierTask, heldout: Batches) -> dict[str, float]:
    """Accuracy on noisy states of held-out images, overall and by tenth of t."""
    task.classifier.eval()
    batches = (batch for start in range(0, HELDOUT_SAMPLES, task.config.batch) for batch in heldout.step(start))
    means = metric_means(add_metric_sums(task.loss("classifier", task.modules(), batch).metrics for batch in batches))
    return {f"heldout_{name}": value for name, value in means.items() if name.startswith("accuracy")}
