"""Trainable stages: what is trained, and the loss of one micro-batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from dvae import keyed
from dvae.config import TrainingConfig
from dvae.data.loader import Batch
from dvae.denoiser import Denoiser, Draws, Given
from dvae.registry.encoders import Encoder, Posterior
from dvae.training.engine import Engine

BUCKETS = 10


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
        """What is trained, each on an engine of its own."""

    @abstractmethod
    def loss(self, name: str, engines: dict[str, Engine], batch: Batch) -> StepOutput:
        """Loss of module `name`; every draw is keyed by batch.keys."""

    def images(self, batch: Batch) -> torch.Tensor:
        """The batch's images in [-1, 1]; channels_last, which is what makes bf16 convolutions fast."""
        return self.place(batch.to_float())

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(self.device)
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def _sums(terms: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    return {name: (float(values.detach().sum()), float(len(values))) for name, values in terms.items()}


class EncoderStage(Stage):
    """The VAE alone: reconstruction + KL."""

    name = "encoder"

    def __init__(self, encoder: Encoder, config: TrainingConfig, seed: int, device: torch.device) -> None:
        super().__init__(config, seed, device)
        self.encoder = encoder

    def modules(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder}

    def loss(self, name: str, engines: dict[str, Engine], batch: Batch) -> StepOutput:
        noise = keyed.normal(self.seed, "posterior", batch.keys.tolist(), self.encoder.latent_shape)
        terms = engines[name](self.images(batch), self.place(noise))
        return StepOutput(terms["loss"].mean(), _sums(terms))


class RefinerStage(Stage):
    """The refiner, conditioned on a fresh x_hat from the frozen encoder at every step.

    `posteriors` (mean and logvar of every training image, by data set index) spares encoding where images are not
    flipped: the draw z ~ q(z | x) is the same.
    """

    name = "refiner"

    def __init__(
        self,
        encoder: Encoder,
        denoiser: Denoiser,
        posteriors: Posterior | None,
        config: TrainingConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__(config, seed, device)
        self.encoder = encoder.eval().requires_grad_(False)
        self.denoiser = denoiser
        self.posteriors = posteriors

    def modules(self) -> dict[str, nn.Module]:
        return {"refiner": self.denoiser}

    @torch.no_grad()
    def given(self, batch: Batch, x: torch.Tensor) -> Given:
        """x_hat from a freshly drawn z, without gradient."""
        noise = self.place(keyed.normal(self.seed, "posterior", batch.keys.tolist(), self.encoder.latent_shape))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision.name == "bf16"):
            if self.posteriors is None:
                posterior = self.encoder.encode(x)
            else:
                mean, logvar = (part[batch.indices] for part in (self.posteriors.mean, self.posteriors.logvar))
                posterior = Posterior(self.place(mean), self.place(logvar))
            z = posterior.sample(noise)
            return Given(self.place(self.encoder.decode(z).float()), z.float())

    def loss(self, name: str, engines: dict[str, Engine], batch: Batch) -> StepOutput:
        x = self.images(batch)
        drawn = self.denoiser.draw(self.seed, batch.keys)
        draws = Draws(drawn.t, self.place(drawn.eps), drawn.keep)
        losses = engines[name](x, self.given(batch, x), draws)
        metrics = _sums({"loss": losses}) | _by_time(losses.detach(), draws.t)
        return StepOutput(losses.mean(), metrics)


def _by_time(losses: torch.Tensor, t: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Sums of the loss in tenths of t: loss_t0 is t in (0, 0.1], ..., loss_t9 is (0.9, 1]."""
    bucket = (torch.ceil(t * BUCKETS).long() - 1).clamp(0, BUCKETS - 1)
    sums = torch.zeros(BUCKETS, dtype=torch.float64).index_add_(0, bucket, losses.double().cpu())
    counts = torch.bincount(bucket, minlength=BUCKETS)
    return {f"loss_t{i}": (float(sums[i]), float(counts[i])) for i in range(BUCKETS) if counts[i]}
