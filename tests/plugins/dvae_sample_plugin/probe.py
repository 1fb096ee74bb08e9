"""A stage in one file, as a stranger would add it: a linear probe of the latent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from dvae.config.schema import TrainingConfig
from dvae.data.loading.loader import Batch
from dvae.errors import UserError
from dvae.registry.encoders.base import Encoder
from dvae.registry.stages.base import STAGES, StageConfig, settings_of
from dvae.runs.folder import Run
from dvae.stages.base import TrainStage
from dvae.stages.run_models import default_device, load_models
from dvae.training.metric_sums import metric_sums
from dvae.training.train_task import Engines, StepOutput, TrainTask


@dataclass(kw_only=True, slots=True)
class ProbeConfig:
    """What is predicted from z."""

    power: float = 1.0
    """The mean of the pixels to this power."""


class ProbeTask(TrainTask):
    """A linear map of z to the brightness of the image."""

    name = "probe"

    def __init__(self, encoder: Encoder, power: float, config: TrainingConfig, seed: int, device: torch.device) -> None:
        super().__init__(config, seed, device)
        self.encoder, self.power = encoder.eval().requires_grad_(False), power
        self.probe = nn.Linear(encoder.latent_shape[0], 1).to(device)

    def modules(self) -> dict[str, nn.Module]:
        return {self.name: self.probe}

    def loss(self, name: str, engines: Engines, batch: Batch) -> StepOutput:
        x = self.images(batch)
        brightness = ((x + 1) / 2).mean((1, 2, 3)) ** self.power
        with torch.no_grad(), self.autocast():
            z = self.encoder.encode(x).mean.float()
        losses = (engines[name](z)[:, 0].float() - brightness) ** 2
        return StepOutput(losses.mean(), metric_sums({"loss": losses}))


@STAGES.register("probe")
class ProbeStage(TrainStage):
    """Trains a linear probe that tells the brightness of an image from its latent."""

    @dataclass(kw_only=True, slots=True)
    class Config(StageConfig):
        probe: ProbeConfig = field(default_factory=ProbeConfig)
        train_probe: TrainingConfig = field(default_factory=TrainingConfig)

    after, before = ("encoder",), ("evaluate",)
    parts: ClassVar = {"probe": ""}

    @property
    def settings(self) -> ProbeConfig:
        return settings_of(self.config, self.Config).probe

    def check_settings(self) -> None:
        if self.settings.power <= 0:
            raise UserError(f"probe.power={self.settings.power:g}: use more than 0")

    def open_task(self, run: Run, name: str) -> ProbeTask:
        torch.manual_seed(self.config.seed)
        encoder = load_models(run, self.config, "encoder").encoder
        return ProbeTask(encoder, self.settings.power, self.training, self.config.seed, default_device())
