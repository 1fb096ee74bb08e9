"""Abstract base class of training tasks, and the output of one micro-batch."""

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
"""Callable modules by name. In training, each is an Engine."""


@dataclass(frozen=True)
class StepOutput:
    """Loss and metrics of one micro-batch."""

    loss: torch.Tensor
    """Scalar to minimize."""
    metrics: MetricSums
    """Sums and counts of metrics."""


class TrainTask(ABC):
    """What one stage trains: its trainable modules by name, and their losses."""

    name: str
    """Name of the stage."""

    def __init__(self, config: TrainingConfig, seed: int, device: torch.device) -> None:
        self.config = config
        self.seed = seed
        self.device = device

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """The modules to train, by name. Each gets its own engine.

        One must have the name of the task: the run keeps its averaged weights, and uses them for previews and scores.
        """

    @property
    def needs_images(self) -> bool:
        """Whether the task needs the images of a batch. If not, they are not loaded."""
        return True

    def module_config(self, name: str) -> TrainingConfig:
        """The training settings of module `name`."""
        return self.config

    def trains(self, name: str, step: int) -> bool:
        """Whether module `name` takes step number `step` (from 1)."""
        return True

    @abstractmethod
    def loss(self, name: str, engines: Engines, batch: Batch) -> StepOutput:
        """Compute the loss of module `name` on one micro-batch.

        Random numbers must be keyed by `batch.keys`. Then they do not depend on the ranks or on how a batch is split.
        """

    def autocast(self) -> torch.autocast:
        """A context with the precision of the engines, for modules that are called without an engine."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision is Precision.bf16)

    def images(self, batch: Batch) -> torch.Tensor:
        """The images of a batch, (B, C, H, W) in [-1, 1], on the device, in channels_last memory format."""
        return self.to_device(batch.to_float())

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Move a tensor to the device. Tensors of 4 dimensions get the memory format channels_last."""
        tensor = tensor.to(self.device)
        # bf16 convolutions are faster in this format.
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

    def labels(self, batch: Batch) -> torch.Tensor | None:
        """Class numbers (B,) of the images, or None if they have no classes."""
        return None if batch.labels is None else self.to_device(batch.labels)

    def posterior_noise(self, batch: Batch, encoder: Encoder) -> torch.Tensor:
        """Standard normal noise (B, *latent) for a sample of q(z | x)."""
        return self.to_device(rng.normal(self.seed, "posterior", batch.keys.tolist(), encoder.latent_shape))

    def sample_noise(self, batch: Batch, denoiser: Denoiser) -> NoiseSample:
        """Draw the times and the noise for a batch, keyed by the sample numbers."""
        sample = denoiser.sample_noise(self.seed, batch.keys)
        aux_noise = None if sample.aux_noise is None else self.to_device(sample.aux_noise)
        return replace(sample, eps=self.to_device(sample.eps), aux_noise=aux_noise)
