"""The stage cache: write the posteriors or reconstructions of all training images into shards.

The training of the refiner reads them instead of running the encoder in every step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from dvae.config.schema import Precision, RunConfig
from dvae.data import latent_cache
from dvae.data.building import cache_build, shard_request
from dvae.data.images import to_uint8
from dvae.data.shards.manifest import FILE as MANIFEST
from dvae.errors import UserError
from dvae.models.components import RunModels
from dvae.registry.encoders.base import Posterior
from dvae.registry.stages.base import STAGES, StageConfig, settings_of
from dvae.runs.folder import Run
from dvae.stages.base import Stage
from dvae.stages.posteriors import encode_images
from dvae.stages.run_models import load_models
from dvae.tracking.console import CountedProgress
from dvae.training.batches import open_shards
from dvae.training.resilience.damage_record import record_damage
from dvae.utils import rng
from dvae.utils.atomic_files import sha256


class CacheContents(Enum):
    """The values that the stage cache stores for each training image."""

    posteriors = "posteriors"
    reconstructions = "reconstructions"


@dataclass(kw_only=True, slots=True)
class CacheConfig:
    """Settings of the cache of encoder outputs, which the training of the refiner reads."""

    folder: str = "${run}/latents"
    """Folder of the cache's shards. It is written if it does not exist."""
    contents: CacheContents = CacheContents.posteriors
    """posteriors: mean and logvar of each image, from which every step draws a new z. reconstructions: `draws` fixed
    samples of z and their x_hat, rounded to 8 bits, so that the decoder is not run either."""
    draws: int = 8
    """For contents=reconstructions: number of samples of z per image, 1 or more."""


@STAGES.register("cache")
class CacheStage(Stage):
    """Stores outputs of the trained encoder, so that the refiner's training does not compute them in every step."""

    @dataclass(kw_only=True, slots=True)
    class Config(StageConfig):
        """Settings of the stage cache."""

        cache: CacheConfig = field(default_factory=CacheConfig)
        """Settings of the cache of encoder outputs."""

    after, before = ("encoder", "prior"), ("refiner",)
    own_job, needs_gpus = True, False
    mutable = ("cache",)  # a cache of other settings is refused when it is opened
    in_parts = True

    def check(self, models: RunModels) -> None:
        if not models.parameters()["encoder"]:
            name = self.config.encoder.name
            raise UserError(
                f"stages: cache stores the outputs of a trained encoder, but encoder={name} has nothing to train: "
                "leave cache out"
            )
        check_cache_settings(self.config, models)

    def run(self, run: Run) -> None:
        models = load_models(run, self.config, "encoder")
        if run.checkpoints("refiner").exists() and any(run.checkpoints("refiner").iterdir()):
            raise UserError(
                f"run={run.path} has begun to train its refiner without a cache: leave cache out of stages=[...], or "
                "use another run="
            )
        began = time.perf_counter()
        written = write_cache(run, self.config, models)
        seconds = time.perf_counter() - began
        run.finish(self.name, {"seconds": seconds, "images": written.images, "draws": written.draws})

    def run_part(self, run: Run, part: int, parts: int) -> None:
        models = load_models(run, self.config, "encoder")
        write_cache_part(run, self.config, models, part, parts)


def cache_settings(config: RunConfig) -> CacheConfig:
    """Return the settings of a run's cache."""
    return settings_of(config, CacheStage.Config).cache


def check_cache_settings(config: RunConfig, models: RunModels) -> None:
    """Raise UserError if the run cannot use a cache with its settings."""
    if config.data.flip:
        raise UserError("stages: cache has no mirrored images, which data.flip=true needs: set data.flip=false")
    settings = cache_settings(config)
    reconstructions = settings.contents is CacheContents.reconstructions
    if reconstructions and models.latent_space:
        raise UserError(
            "cache.contents=reconstructions is not used with denoiser.space=latent: use cache.contents=posteriors"
        )
    if reconstructions and settings.draws < 1:
        raise UserError(f"cache.draws={settings.draws}: use 1 or more")


def expected_cache(run: Run, config: RunConfig, models: RunModels) -> latent_cache.CacheInfo:
    """Return the description that the run's cache must have.

    Raises UserError if the stage encoder is not finished, or if the run cannot use a cache with its settings.
    """
    if "encoder" not in run.records():
        raise UserError(f"run={run.path} has no trained encoder yet, which a cache needs: run the stage encoder first")
    check_cache_settings(config, models)
    settings = cache_settings(config)
    reconstructions = settings.contents is CacheContents.reconstructions
    shards = open_shards(config, "train")
    return latent_cache.CacheInfo(
        images=len(shards),
        draws=settings.draws if reconstructions else 0,
        latent=list(models.shapes.latent),
        encoder_sha256=sha256(run.weights("encoder")),
        images_sha256=sha256(shards.folder / MANIFEST),
        precision=config.training("refiner").precision.name,
        seed=config.seed,
    )


def write_cache(run: Run, config: RunConfig, models: RunModels) -> latent_cache.CacheInfo:
    """Write the run's cache if it does not exist, and return its description. `models` holds the trained encoder."""
    spec = _cache_spec(run, config, models)
    with CountedProgress("cache") as progress:
        cache_build.build_cache(Path(cache_settings(config).folder), spec, progress)
    record_damage(run.path, spec.images)
    return spec.info


def write_cache_part(run: Run, config: RunConfig, models: RunModels, part: int, parts: int) -> int:
    """Compute part number `part` (from 0) of `parts` of the run's cache. `write_cache` publishes all parts together.

    Several processes may compute different parts at the same time, also while another process holds the lock of the run
    folder. This function writes nothing into the run folder except the cache. `write_cache` records damaged images.
    `models` holds the trained encoder. Returns the number of images of the part.
    """
    shard_request.check_part(part, parts)
    with CountedProgress(f"cache, part {part + 1} of {parts}") as progress:
        return cache_build.build_cache_part(
            Path(cache_settings(config).folder), _cache_spec(run, config, models), part, parts, progress
        )


def _cache_spec(run: Run, config: RunConfig, models: RunModels) -> cache_build.CacheSpec:
    expected, shards = expected_cache(run, config, models), open_shards(config, "train")

    def samples(start: int, stop: int) -> Iterator[latent_cache.CachedSample]:
        index = start
        for posterior in encode_images(config, models.encoder, shards, start, stop):
            for mean, logvar in zip(posterior.mean, posterior.logvar, strict=True):
                yield cache_sample(config, models, expected, index, Posterior(mean[None], logvar[None]))
                index += 1

    return cache_build.CacheSpec(expected, config.evaluate.batch, shards, samples)


@torch.no_grad()
def cache_sample(
    config: RunConfig, models: RunModels, expected: latent_cache.CacheInfo, index: int, posterior: Posterior
) -> latent_cache.CachedSample:
    """Compute the cached values of one image from its posterior, which has shape (1, *latent).

    The samples of z are keyed by the run's seed and `index`, the image's index in the training split.
    """
    if not expected.draws:
        return latent_cache.CachedSample(torch.cat([posterior.mean, posterior.logvar]).cpu().numpy(), [])
    noise = [
        rng.normal(config.seed, f"cached draw {draw}", [index], models.shapes.latent) for draw in range(expected.draws)
    ]
    z = posterior.sample(torch.cat(noise).to(posterior.mean.device))
    with torch.autocast(z.device.type, torch.bfloat16, enabled=expected.precision == Precision.bf16.name):
        x_hat = to_uint8(models.encoder.decode(z).float())
    return latent_cache.CachedSample(z.cpu().numpy(), list(x_hat.permute(0, 2, 3, 1).cpu().contiguous().numpy()))


@dataclass(kw_only=True, slots=True)
class CacheToolConfig(CacheConfig):
    """Settings of tools/cache.py."""

    run: str = MISSING
    """A run folder with a trained encoder."""
    part: int | None = None
    """Compute only this part (from 0) of `parts`, and publish nothing (null: compute all parts and publish them)."""
    parts: int = 1
    """Number of parts into which the work is divided. Each part is computed by a separate command."""
    shards: str = ""
    """Location of the run's shards. It is needed if they were moved, or if they are at a URL or come from a command
    (empty: the location in the run's settings)."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import. They register components."""


ConfigStore.instance().store(name="cache_schema", node=CacheToolConfig, provider="dvae")
