"""Sources of z for training images: the encoder, stored posteriors, or a cache of samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from dvae.config.schema import RunConfig
from dvae.data.latent_cache import LatentCache
from dvae.data.loading.loader import Batch
from dvae.models.components import RunModels
from dvae.registry.encoders.base import Encoder, Posterior
from dvae.runs.folder import Run
from dvae.stages.cache import cache_settings, expected_cache
from dvae.stages.posteriors import load_posteriors, save_posteriors
from dvae.training.batches import open_shards
from dvae.training.resilience import ranks
from dvae.utils import rng


class LatentSource(Protocol):
    """Samples z for the images of a batch."""

    needs_images: bool
    """Whether `sample` uses the images x."""

    def sample(self, batch: Batch, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return z (B, *latent), and its x_hat (B, C, H, W) if the source stores it, otherwise None.

        Args:
            batch: The batch.
            x: Its images (B, C, H, W), in [-1, 1]. They may be empty if `needs_images` is False.
            noise: Standard normal noise (B, *latent).
        """
        ...


class EncodedLatents:
    """Samples z ~ q(z | x) by encoding the images in every step. The other sources avoid this computation."""

    needs_images = True

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def sample(self, batch: Batch, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.encoder.encode(x).sample(noise), None


class PosteriorLatents:
    """Samples z ~ q(z | x), with stored mean and logvar. It draws the same z as encoding does.

    look_up(indices) returns mean and logvar, each (B, *latent), of the images with these indices (B,).
    """

    needs_images = False

    def __init__(self, look_up: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.look_up = look_up

    def sample(self, batch: Batch, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        mean, logvar = (part.to(noise.device) for part in self.look_up(batch.indices))
        return Posterior(mean, logvar).sample(noise), None


class CachedReconstructions:
    """Returns one of the cached samples of z of each image, with its x_hat. The sample number determines which one."""

    needs_images = False

    def __init__(self, cache: LatentCache, seed: int) -> None:
        self.cache, self.seed = cache, seed

    def sample(self, batch: Batch, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        chosen = rng.uniform(self.seed, "cached draw", batch.keys.tolist()) * self.cache.info.draws
        z, x_hat = self.cache.reconstructions(batch.indices, chosen.long())
        return z.to(noise.device), x_hat


def open_latents(run: Run, config: RunConfig, models: RunModels) -> LatentSource:
    """Open the source of z for the refiner's training.

    It is the cache if the stage cache is finished. Otherwise it is the stored posteriors, if they fit in
    data.cache_gib, or else the encoder. With data.flip, posteriors are not stored, because they depend on the flip.
    """
    if "cache" in run.records():
        shape = (config.channels, config.image_size, config.image_size)
        cache = LatentCache(Path(cache_settings(config).folder), expected_cache(run, config, models), shape)
        return CachedReconstructions(cache, config.seed) if cache.info.draws else PosteriorLatents(cache.posteriors)
    if config.data.flip or "encoder" not in models.trained_parts():
        return EncodedLatents(models.encoder)
    # mean and logvar of every image, 4 bytes per value
    size = 2 * 4 * open_shards(config, "train").manifest.count("train") * math.prod(models.shapes.latent)
    if size > config.data.cache_gib * 2**30:
        return EncodedLatents(models.encoder)
    ranks.on_rank_zero(save_posteriors, run, config, models)
    known = load_posteriors(run, config, models)
    return PosteriorLatents(lambda indices: (known.mean[indices], known.logvar[indices]))
