"""The abstract base class of what the training loop trains, and what one micro-batch gives it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dvae.config.schema import Precision, TrainingConfig
from dvae.data.loading.loader import Batch
from dvae.diffusion.conditioning import NoiseSample
from dvae.diffusion.denoiser import Denoiser
from dvae.registry.encoders.base import Encoder
from dvae.training.metric_sums import MetricSums
from dvae.utils import rng

Engines = Mapping[str, Callable[..., Any]]
"""Callable modules by name. In training each is an Engine."""


@dataclass(frozen=True)
class StepOutput:
    """Loss of one micro-batch, and metrics that are averaged over batches."""

    loss: torch.Tensor
    metrics: MetricSums


class TrainTask(ABC):
    """One training: trainable modules by name, and their losses."""

    name: str

    def __init__(self, config: TrainingConfig, seed: int, device: torch.device) -> None:
        self.config = config
        self.seed = seed
        self.device = device

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """The trained modules, each on an engine of its own. The weights of the one named like the task are kept."""

    @property
    def needs_images(self) -> bool:
        """Whether batches must hold their images."""
        return True

    def module_config(self, name: str) -> TrainingConfig:
        """The training settings of module `name`."""
        return self.config

    def trains(self, name: str, step: int) -> bool:
        """Whether module `name` takes step number `step` (from 1)."""
        return True

    @abstractmethod
    def loss(self, name: str, engines: Engines, batch: Batch) -> StepOutput:
        """Compute the loss of module `name`. Every random number is keyed by batch.keys."""

    def autocast(self) -> torch.autocast:
        """The arithmetic of the engines, for modules that are called without one."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision is Precision.bf16)

    def images(self, batch: Batch) -> torch.Tensor:
        """The batch's images in [-1, 1], in the format channels_last, which makes bf16 convolutions fast."""
        return self.to_device(batch.to_float())

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(self.device)
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

    def labels(self, batch: Batch) -> torch.Tensor | None:
        """Classes (B,), or None if the images have none."""
        return None if batch.labels is None else self.to_device(batch.labels)

    def posterior_noise(self, batch: Batch, encoder: Encoder) -> torch.Tensor:
        """Noise (B, *latent) from which q(z | x) is sampled."""
        return self.to_device(rng.normal(self.seed, "posterior", batch.keys.tolist(), encoder.latent_shape))

    def sample_noise(self, batch: Batch, denoiser: Denoiser) -> NoiseSample:
        """Times and noise of the batch, keyed by its sample numbers."""
        sample = denoiser.sample_noise(self.seed, batch.keys)
        aux_noise = None if sample.aux_noise is None else self.to_device(sample.aux_noise)
        return replace(sample, eps=self.to_device(sample.eps), aux_noise=aux_noise)
