"""The stage cache: posteriors, or reconstructions, of all training images in shards, for the refiner's training."""

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
    """What the cache stage keeps of each training image."""

    posteriors = "posteriors"
    reconstructions = "reconstructions"


@dataclass(kw_only=True, slots=True)
class CacheConfig:
    """What the cache stage computes with the trained encoder, so that the refiner's training need not."""

    folder: str = "${run}/latents"
    """Folder of the shards; written where they do not exist yet."""
    contents: CacheContents = CacheContents.posteriors
    """posteriors: mean and logvar, from which z is drawn anew at every visit; reconstructions: `draws` fixed draws of z
    and their x_hat, rounded to 8 bits, so that nothing is decoded either."""
    draws: int = 8
    """For reconstructions: how many there are of each image."""


@STAGES.register("cache")
class CacheStage(Stage):
    """Computes with the trained encoder what the refiner's training need not compute again."""

    @dataclass(kw_only=True, slots=True)
    class Config(StageConfig):
        cache: CacheConfig = field(default_factory=CacheConfig)

    after, before = ("encoder", "prior"), ("refiner",)
    own_job, needs_gpus = True, False
    in_parts = True

    def check(self, models: RunModels) -> None:
        if not models.parameters()["encoder"]:
            name = self.config.encoder.name
            raise UserError(f"stages: cache keeps what an encoder makes, encoder={name} makes nothing")

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
    """The settings of a run's cache."""
    return settings_of(config, CacheStage.Config).cache


def expected_cache(run: Run, config: RunConfig, models: RunModels) -> latent_cache.CacheInfo:
    """The description that the run's cache must have.

    Raises UserError if the stage encoder is not finished, or if no cache can serve the run.
    """
    if "encoder" not in run.records():
        raise UserError(f"run={run.path} has no finished stage encoder yet: a cache is made of what it has trained")
    if config.data.flip:
        raise UserError("stages: cache holds each image as it is, data.flip=true asks for both: set data.flip=false")
    settings = cache_settings(config)
    reconstructions = settings.contents is CacheContents.reconstructions
    if reconstructions and models.latent_space:
        raise UserError(
            "cache.contents=reconstructions has no use where denoiser.space=latent: use cache.contents=posteriors"
        )
    if reconstructions and settings.draws < 1:
        raise UserError(f"cache.draws={settings.draws}: use 1 or more")
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
    """The run's cache, written where it is not there yet. `models` holds the trained encoder."""
    spec = _cache_spec(run, config, models)
    with CountedProgress("cache") as progress:
        cache_build.build_cache(Path(cache_settings(config).folder), spec, progress)
    record_damage(run.path, spec.images)
    return spec.info


def write_cache_part(run: Run, config: RunConfig, models: RunModels, part: int, parts: int) -> int:
    """Make part number `part` (0 is the first) of `parts` of the run's cache, which `write_cache` publishes.

    Returns how many images the part has. `models` holds the trained encoder. Parts may be made at the same time, and
    while the run's folder is held: nothing in it is touched, and damaged images are noted down by `write_cache`.
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
    """The cached values of one image, whose posterior is (1, *latent)."""
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
    """What tools/cache.py takes."""

    run: str = MISSING
    """A run folder with a trained encoder."""
    part: int | None = None
    """Make only this part (0 is the first) of `parts`, and publish nothing; null: all."""
    parts: int = 1
    """How many parts are made, each by a command of its own."""
    shards: str = ""
    """Place of the run's shards if it is a command or an address, or if they were moved (empty: where the run says)."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import, which register components."""


ConfigStore.instance().store(name="cache_schema", node=CacheToolConfig, provider="dvae")
