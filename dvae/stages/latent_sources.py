"""Where z of a training image comes from: the encoder, posteriors that were computed once, or a cache of draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from dvae.data.latent_cache import LatentCache
from dvae.data.loading.loader import Batch
from dvae.registry.encoders.base import Encoder, Posterior
from dvae.utils import rng


class Latents(Protocol):
    """Draws z of the images of a batch."""

    encodes: bool
    """Whether the images are looked at."""

    def draw(self, batch: Batch, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """z (B, *latent), and its x_hat where it is known without decoding.

        x (B, C, H, W) in [-1, 1] are the images, noise ~ N(0, I) is (B, *latent).
        """
        ...


class Encoded:
    """z ~ q(z | x), by encoding the images anew: what all else stands for."""

    encodes = True

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def draw(self, batch: Batch, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.encoder.encode(x).sample(noise), None


class Posteriors:
    """z ~ q(z | x), with mean and logvar looked up by index of the image; the same draws as by encoding."""

    encodes = False

    def __init__(self, look_up: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.look_up = look_up

    def draw(self, batch: Batch, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        mean, logvar = (part.to(noise.device) for part in self.look_up(batch.indices))
        return Posterior(mean, logvar).sample(noise), None


class Reconstructions:
    """One of an image's cached draws of z with its x_hat; which one is keyed by the sample number."""

    encodes = False

    def __init__(self, cache: LatentCache, seed: int) -> None:
        self.cache, self.seed = cache, seed

    def draw(self, batch: Batch, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        chosen = rng.uniform(self.seed, "cached draw", batch.keys.tolist()) * self.cache.about.draws
        z, x_hat = self.cache.reconstructions(batch.indices, chosen.long())
        return z.to(noise.device), x_hat
