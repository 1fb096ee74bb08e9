"""Adversarial training of an encoder and a discriminator, in turns (Esser et al. 2021, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dvae.config.schema import TrainingConfig
from dvae.data.loading.loader import Batch
from dvae.layers.adversarial import adaptive_weight, discriminator_loss, generator_loss
from dvae.registry.encoders.base import Adversary, Encoder
from dvae.stages.encoder_terms import encoder_losses
from dvae.training.metric_sums import MetricSums, metric_sums
from dvae.training.train_task import Engines, StepOutput, TrainTask


class GanTask(TrainTask):
    """The task that trains an encoder and a discriminator.

    Each step updates the encoder. After the first `adversary.start` steps, it also updates the discriminator.

    The metric "loss" is the encoder's objective without the adversarial loss, which is the metric "generator". The
    confidences are the discriminator's probabilities that an image is real, averaged over patches. The adaptive weight
    is computed for each micro-batch.
    """

    name = "encoder"

    def __init__(
        self, encoder: Encoder, adversary: Adversary, config: TrainingConfig, seed: int, device: torch.device
    ) -> None:
        super().__init__(config, seed, device)
        self.encoder = encoder
        self.adversary = adversary
        adversary.discriminator.to(device)
        self.fakes: dict[int, torch.Tensor] = {}
        """Reconstructions of this step's micro-batches, by the first sample number of each.

        The encoder's loss stores them, and the discriminator's loss uses them later in the same step."""

    def modules(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "discriminator": self.adversary.discriminator}

    def module_config(self, name: str) -> TrainingConfig:
        return self.config if name == "encoder" else replace(self.config, lr=self.config.lr * self.adversary.lr)

    def trains(self, name: str, step: int) -> bool:
        return name == "encoder" or step > self.adversary.start

    def loss(self, name: str, engines: Engines, batch: Batch) -> StepOutput:
        loss = self.encoder_loss if name == "encoder" else self.discriminator_loss
        return loss(engines[name], batch)

    def encoder_loss(self, engine: Callable[..., Any], batch: Batch) -> StepOutput:
        x = self.images(batch)
        terms = engine(x, self.posterior_noise(batch, self.encoder))
        x_hat, features = terms["x_hat"], terms["features"]
        loss, metrics = terms["loss"].mean(), metric_sums(encoder_losses(terms))
        first = int(batch.keys[0])
        step = first // self.config.batch + 1
        if self.trains("discriminator", step):
            self.fakes[first] = x_hat.detach()
        if step > self.adversary.start + self.adversary.warmup:
            gradient, adversarial_metrics = self.adversarial_gradient(x, x_hat.detach(), features.detach())
            # The gradient of this product with respect to x_hat is `gradient`. So the backward pass of the encoder gets
            # the adversarial gradient without a second pass through the discriminator.
            loss = loss + (gradient * x_hat).sum()
            metrics |= adversarial_metrics
        return StepOutput(loss, metrics)

    def adversarial_gradient(
        self, x: torch.Tensor, x_hat: torch.Tensor, features: torch.Tensor
    ) -> tuple[torch.Tensor, MetricSums]:
        """Return the gradient (B, C, H, W) of the weighted adversarial loss with respect to x_hat, and its metrics.

        x_hat and features must be detached from the encoder: only the backward pass of DeepSpeed's engine may
        differentiate through its module.
        """
        adversary = self.adversary
        x_hat.requires_grad_()
        with self.autocast():
            distance = adversary.distance(x, x_hat).mean()
            generator = generator_loss(adversary.loss, adversary.discriminator(x_hat)).mean()
        (distance_gradient,) = torch.autograd.grad(distance, x_hat)
        (generator_gradient,) = torch.autograd.grad(generator, x_hat)
        adaptive = adaptive_weight(adversary.last_layer, features, distance_gradient, generator_gradient)
        weight = adversary.weight * adaptive
        metrics = {"generator": (float(generator.detach()), 1.0), "adaptive_weight": (float(weight), 1.0)}
        return weight * generator_gradient, metrics

    def discriminator_loss(self, engine: Callable[..., Any], batch: Batch) -> StepOutput:
        fake = self.fakes.pop(int(batch.keys[0]))
        real_logits, fake_logits = engine(torch.cat([self.images(batch), fake])).chunk(2)
        losses = discriminator_loss(self.adversary.loss, real_logits, fake_logits).flatten(1).mean(1)
        confidence = {"real": torch.sigmoid(real_logits), "fake": torch.sigmoid(fake_logits)}
        metrics = {f"confidence_{name}": values.flatten(1).mean(1) for name, values in confidence.items()}
        return StepOutput(losses.mean(), metric_sums({"discriminator": losses} | metrics))
