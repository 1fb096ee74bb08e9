"""The base class of tasks that train on noisy states of images or latents."""

from __future__ import annotations

import torch

from dvae.config.schema import TrainingConfig
from dvae.data.loading.loader import Batch
from dvae.diffusion.conditioning import Conditioning
from dvae.diffusion.denoiser import Denoiser, Space
from dvae.registry.encoders.base import Encoder
from dvae.stages.latent_sources import LatentSource
from dvae.training.train_task import TrainTask


class NoisyTask(TrainTask):
    """A task on noisy states, with a new sample of z in every step. The encoder is frozen."""

    def __init__(
        self,
        encoder: Encoder,
        denoiser: Denoiser,
        latents: LatentSource,
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
        return self.latents.needs_images or self.denoiser.config.space is Space.pixel

    @torch.no_grad()
    def clean_data(self, batch: Batch) -> tuple[torch.Tensor, Conditioning]:
        """Return the clean data x (B, C, H, W) and its conditioning, without gradients.

        In pixel space, x is the images, and the conditioning is a new sample of z and its x_hat. In latent space, x is
        the sample of z, without a condition. If the images have classes, the conditioning contains them.
        """
        label = self.labels(batch)
        noise = self.posterior_noise(batch, self.encoder)
        x = self.images(batch)
        with self.autocast():
            z, x_hat = self.latents.sample(batch, x, noise)
            if self.denoiser.config.space is Space.latent:
                z = self.to_device(z.float())
                return z, Conditioning.unconditional(z, label)
            if x_hat is None:
                x_hat = self.encoder.decode(z).float()
        return x, Conditioning(self.to_device(x_hat), z.float(), label)
