"""Trainable stages: what is trained, and the loss of one micro-batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dvae.config.schema import Precision, TrainingConfig
from dvae.data.loading.loader import Batch
from dvae.diffusion.conditioning import Conditioning, NoiseSample
from dvae.diffusion.denoiser import Denoiser, Space
from dvae.layers.adversarial import adaptive_weight, discriminator_loss, generator_loss
from dvae.registry.classifiers.base import Classifier
from dvae.registry.encoders.base import Adversary, Encoder
from dvae.stages.latent_sources import Latents
from dvae.utils import rng

BUCKETS = 10
DRAWN = ("z", "x_hat", "features")
"""What an encoder's forward returns besides figures."""
Engines = Mapping[str, Callable[..., Any]]
"""Modules by name, to be called as such: an Engine each in training."""


@dataclass(frozen=True)
class StepOutput:
    """Loss of one micro-batch, and figures to be averaged over batches.

    A figure is (sum, count), so that a rare one (a bucket of t) is weighted by how often it occurred.
    """

    loss: torch.Tensor
    metrics: dict[str, tuple[float, float]]


class Stage(ABC):
    """One training job: trainable modules by name, and their losses."""

    name: str

    def __init__(self, config: TrainingConfig, seed: int, device: torch.device) -> None:
        self.config = config
        self.seed = seed
        self.device = device

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """What is trained, each on an engine of its own; the one named like the stage is kept."""

    @property
    def needs_images(self) -> bool:
        """Whether batches must hold their images."""
        return True

    def settings(self, name: str) -> TrainingConfig:
        """How module `name` is trained."""
        return self.config

    def trains(self, name: str, step: int) -> bool:
        """Whether module `name` takes step number `step` (from 1)."""
        return True

    @abstractmethod
    def loss(self, name: str, engines: Engines, batch: Batch) -> StepOutput:
        """Loss of module `name`; every draw is keyed by batch.keys."""

    def autocast(self) -> torch.autocast:
        """The arithmetic of the engines, for modules that are called without one."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision is Precision.bf16)

    def images(self, batch: Batch) -> torch.Tensor:
        """The batch's images in [-1, 1]; channels_last, which is what makes bf16 convolutions fast."""
        return self.place(batch.to_float())

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(self.device)
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

    def labels(self, batch: Batch) -> torch.Tensor | None:
        """Classes (B,), where the images have any."""
        return None if batch.labels is None else self.place(batch.labels)

    def posterior_noise(self, batch: Batch, encoder: Encoder) -> torch.Tensor:
        """What q(z | x) is sampled with, (B, *latent)."""
        return self.place(rng.normal(self.seed, "posterior", batch.keys.tolist(), encoder.latent_shape))

    def sample_noise(self, batch: Batch, denoiser: Denoiser) -> NoiseSample:
        """Times and noise of the batch, keyed by its sample numbers."""
        drawn = denoiser.sample_noise(self.seed, batch.keys)
        start = None if drawn.start is None else self.place(drawn.start)
        return replace(drawn, eps=self.place(drawn.eps), start=start)


def sums(terms: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    return {name: (float(values.detach().sum()), float(len(values))) for name, values in terms.items()}


def encoder_figures(terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of an encoder's terms that are one number (B,) per image."""
    return {name: values for name, values in terms.items() if name not in DRAWN}


class EncoderStage(Stage):
    """The VAE alone: reconstruction + KL."""

    name = "encoder"

    def __init__(self, encoder: Encoder, config: TrainingConfig, seed: int, device: torch.device) -> None:
        super().__init__(config, seed, device)
        self.encoder = encoder

    def modules(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder}

    def loss(self, name: str, engines: Engines, batch: Batch) -> StepOutput:
        terms = engines[name](self.images(batch), self.posterior_noise(batch, self.encoder))
        return StepOutput(terms["loss"].mean(), sums(encoder_figures(terms)))


class GanStage(EncoderStage):
    """An encoder and its adversary's discriminator, in turns (Esser et al. 2021, section 3.1).

    "loss" stays the encoder's own objective; the adversarial loss is "generator". Confidences are the discriminator's
    probabilities that an image is real, averaged over patches. The adaptive weight is that of a micro-batch.
    """

    def __init__(
        self, encoder: Encoder, adversary: Adversary, config: TrainingConfig, seed: int, device: torch.device
    ) -> None:
        super().__init__(encoder, config, seed, device)
        self.adversary = adversary
        adversary.discriminator.to(device)
        self.fakes: dict[int, torch.Tensor] = {}
        """Reconstructions of this step's micro-batches, by their first sample number."""

    def modules(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "discriminator": self.adversary.discriminator}

    def settings(self, name: str) -> TrainingConfig:
        return self.config if name == "encoder" else replace(self.config, lr=self.config.lr * self.adversary.lr)

    def trains(self, name: str, step: int) -> bool:
        return name == "encoder" or step > self.adversary.start

    def loss(self, name: str, engines: Engines, batch: Batch) -> StepOutput:
        turn = self.encoder_turn if name == "encoder" else self.discriminator_turn
        return turn(engines[name], batch)

    def encoder_turn(self, engine: Callable[..., Any], batch: Batch) -> StepOutput:
        x = self.images(batch)
        terms = engine(x, self.posterior_noise(batch, self.encoder))
        x_hat, features = terms["x_hat"], terms["features"]
        loss, metrics = terms["loss"].mean(), sums(encoder_figures(terms))
        first = int(batch.keys[0])
        step = first // self.config.batch + 1
        if self.trains("discriminator", step):
            self.fakes[first] = x_hat.detach()
        if step > self.adversary.start + self.adversary.alone:
            gradient, figures = self.judged(x, x_hat.detach(), features.detach())
            # known already, the gradient is handed on by this product: no second pass through the discriminator
            loss = loss + (gradient * x_hat).sum()
            metrics |= figures
        return StepOutput(loss, metrics)

    def judged(
        self, x: torch.Tensor, x_hat: torch.Tensor, features: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, tuple[float, float]]]:
        """Gradient at x_hat (B, C, H, W) of the weighted adversarial loss, and figures.

        x_hat and features are cut off from the encoder: DeepSpeed's engine allows no gradient through it but backward.
        """
        adversary = self.adversary
        x_hat.requires_grad_()
        with self.autocast():
            distance = adversary.distance(x, x_hat).mean()
            deceit = generator_loss(adversary.loss, adversary.discriminator(x_hat)).mean()
        (pull,) = torch.autograd.grad(distance, x_hat)
        (push,) = torch.autograd.grad(deceit, x_hat)
        weight = adversary.weight * adaptive_weight(adversary.last_layer, features, pull, push)
        return weight * push, {"generator": (float(deceit.detach()), 1.0), "adaptive_weight": (float(weight), 1.0)}

    def discriminator_turn(self, engine: Callable[..., Any], batch: Batch) -> StepOutput:
        fake = self.fakes.pop(int(batch.keys[0]))
        real_logits, fake_logits = engine(torch.cat([self.images(batch), fake])).chunk(2)
        losses = discriminator_loss(self.adversary.loss, real_logits, fake_logits).flatten(1).mean(1)
        confidence = {"real": torch.sigmoid(real_logits), "fake": torch.sigmoid(fake_logits)}
        metrics = {f"confidence_{name}": values.flatten(1).mean(1) for name, values in confidence.items()}
        return StepOutput(losses.mean(), sums({"discriminator": losses} | metrics))


class NoisyStage(Stage):
    """A stage on noisy states of images, or of latents, with a fresh draw of z at every step; the encoder is frozen."""

    def __init__(
        self,
        encoder: Encoder,
        denoiser: Denoiser,
        latents: Latents,
        config: TrainingConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__(config, seed, device)
        self.encoder = encoder.eval().requires_grad_(False)
        self.denoiser = denoiser
        self.latents = latents

    @property
    def needs_images(self) -> bool:
        return self.latents.encodes or self.denoiser.config.space is Space.pixel

    @torch.no_grad()
    def example(self, batch: Batch) -> tuple[torch.Tensor, Conditioning]:
        """What is diffused, x (B, C, H, W), and what is known of it; without gradient.

        Images with the x_hat of a freshly drawn z; in latent space z itself, of which nothing is known. And the class
        where there is one.
        """
        label = self.labels(batch)
        noise = self.posterior_noise(batch, self.encoder)
        x = self.images(batch)
        with self.autocast():
            z, x_hat = self.latents.draw(batch, x, noise)
            if self.denoiser.config.space is Space.latent:
                z = self.place(z.float())
                return z, Conditioning.nothing(z, label)
            if x_hat is None:
                x_hat = self.encoder.decode(z).float()
        return x, Conditioning(self.place(x_hat), z.float(), label)


class RefinerStage(NoisyStage):
    """The refiner."""

    name = "refiner"

    def modules(self) -> dict[str, nn.Module]:
        return {"refiner": self.denoiser}

    def loss(self, name: str, engines: Engines, batch: Batch) -> StepOutput:
        x, conditioning = self.example(batch)
        noise_sample = self.sample_noise(batch, self.denoiser)
        losses = engines[name](x, conditioning, noise_sample)
        return StepOutput(losses.mean(), sums({"loss": losses}) | by_time("loss", losses, noise_sample.t))


class ClassifierStage(NoisyStage):
    """The noisy classifier: cross-entropy on states of the refiner's diffusion (Dhariwal & Nichol 2021, section 4)."""

    name = "classifier"

    def __init__(
        self,
        classifier: Classifier,
        encoder: Encoder,
        denoiser: Denoiser,
        latents: Latents,
        config: TrainingConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__(encoder, denoiser.eval().requires_grad_(False), latents, config, seed, device)
        self.classifier = classifier

    def modules(self) -> dict[str, nn.Module]:
        return {"classifier": self.classifier}

    def loss(self, name: str, engines: Engines, batch: Batch) -> StepOutput:
        x, conditioning = self.example(batch)
        noise_sample = self.sample_noise(batch, self.denoiser)
        assert conditioning.label is not None
        with torch.no_grad():
            u = self.denoiser.add_noise(x, conditioning, noise_sample)  # the condition is never dropped here
            feature = self.denoiser.diffusion.schedule.feature(noise_sample.t).to(self.device, torch.float32)
        logits = engines[name](u, feature, self.denoiser.condition(conditioning))
        losses = F.cross_entropy(logits, conditioning.label, reduction="none")
        figures = {"loss": losses, "accuracy": (logits.argmax(1) == conditioning.label).float()}
        metrics = sums(figures)
        for figure, values in figures.items():
            metrics |= by_time(figure, values, noise_sample.t)
        return StepOutput(losses.mean(), metrics)


def by_time(name: str, values: torch.Tensor, t: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Sums of a figure (B,) in tenths of t: name_t0 is t in (0, 0.1], ..., name_t9 is (0.9, 1]."""
    bucket = (torch.ceil(t * BUCKETS).long() - 1).clamp(0, BUCKETS - 1)
    sums = torch.zeros(BUCKETS, dtype=torch.float64).index_add_(0, bucket, values.detach().double().cpu())
    counts = torch.bincount(bucket, minlength=BUCKETS)
    return {f"{name}_t{i}": (float(sums[i]), float(counts[i])) for i in range(BUCKETS) if counts[i]}
