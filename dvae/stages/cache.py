"""What the trained encoder makes of all training images, computed once: in memory, or in shards by the cache stage."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from dvae.config.schema import CacheContents, Precision, RunConfig
from dvae.data import latent_cache
from dvae.data.building import cache_build, shard_request
from dvae.data.images import to_float, to_uint8
from dvae.data.shards.manifest import FILE as MANIFEST
from dvae.data.shards.reader import Shards
from dvae.errors import UserError
from dvae.models.components import Models
from dvae.registry.encoders.base import Encoder, Posterior
from dvae.runs.folder import Run
from dvae.stages.latent_sources import Encoded, Latents, Posteriors, Reconstructions
from dvae.tracking.console import CountedProgress
from dvae.training.batches import open_shards
from dvae.training.resilience import ranks
from dvae.training.resilience.sample_log import record_damage
from dvae.utils import rng
from dvae.utils.atomic_files import sha256


@torch.no_grad()
def encode(config: RunConfig, encoder: Encoder, shards: Shards, start: int, stop: int) -> Iterator[Posterior]:
    """Posteriors of the training images start, ..., stop - 1, batch by batch, as the refiner's training has them."""
    encoder.eval()
    device = next(encoder.parameters()).device
    bf16 = config.train_refiner.precision is Precision.bf16
    for indices in torch.arange(start, stop).split(config.evaluate.batch):
        x = to_float(shards.read(indices.numpy())).to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            posterior = encoder.encode(x)
        yield Posterior(posterior.mean.float(), posterior.logvar.float())


def posteriors(run: Run, config: RunConfig, made: Models) -> Posterior:
    """Posteriors of all training images, in the order of the data set; computed once and kept in the run folder."""
    keep_posteriors(run, config, made)
    state = run.load_weights("posteriors")
    return Posterior(state["mean"], state["logvar"])


def keep_posteriors(run: Run, config: RunConfig, made: Models) -> None:
    """Compute the posteriors into the run folder, where they are not there yet."""
    if not run.has_weights("posteriors"):
        shards = open_shards(config, "train")
        parts = list(encode(config, made.encoder, shards, 0, len(shards)))
        state = {"mean": torch.cat([p.mean for p in parts]), "logvar": torch.cat([p.logvar for p in parts])}
        record_damage(run.path, shards)
        run.save_weights("posteriors", state)


def open_latents(run: Run, config: RunConfig, made: Models) -> Latents:
    """Where the refiner's training has z from: the cache where that stage was run, else memory where that suffices."""
    if "cache" in run.records():
        shape = (config.channels, config.image_size, config.image_size)
        opened = latent_cache.LatentCache(Path(config.cache.folder), about(run, config, made), shape)
        return Reconstructions(opened, config.seed) if opened.about.draws else Posteriors(opened.posteriors)
    if config.data.flip or "encoder" not in made.trained_parts():
        return Encoded(made.encoder)
    size = 2 * 4 * open_shards(config, "train").manifest.count("train") * math.prod(made.io.latent)
    if size > config.data.cache_gib * 2**30:
        return Encoded(made.encoder)
    ranks.on_rank_zero(keep_posteriors, run, config, made)
    known = posteriors(run, config, made)
    return Posteriors(lambda indices: (known.mean[indices], known.logvar[indices]))


def about(run: Run, config: RunConfig, made: Models) -> latent_cache.CacheInfo:
    """What the run's cache must be.

    Raises UserError where the stage encoder is not finished, and where no cache can serve the run.
    """
    if "encoder" not in run.records():
        raise UserError(f"run={run.path} has no finished stage encoder yet: a cache is made of what it has trained")
    if config.data.flip:
        raise UserError("stages: cache holds each image as it is, data.flip=true asks for both: set data.flip=false")
    reconstructions = config.cache.contents is CacheContents.reconstructions
    if reconstructions and made.latent_space:
        raise UserError(
            "cache.contents=reconstructions has no use where denoiser.space=latent: use cache.contents=posteriors"
        )
    if reconstructions and config.cache.draws < 1:
        raise UserError(f"cache.draws={config.cache.draws}: use 1 or more")
    shards = open_shards(config, "train")
    return latent_cache.CacheInfo(
        images=len(shards),
        draws=config.cache.draws if reconstructions else 0,
        latent=list(made.io.latent),
        encoder_sha256=sha256(run.weights("encoder")),
        images_sha256=sha256(shards.folder / MANIFEST),
        precision=config.train_refiner.precision.name,
        seed=config.seed,
    )


def write_cache(run: Run, config: RunConfig, made: Models) -> latent_cache.CacheInfo:
    """The run's cache, written where it is not there yet. `made` holds the trained encoder."""
    work = _work(run, config, made)
    with CountedProgress("cache") as progress:
        cache_build.write(Path(config.cache.folder), work, progress)
    record_damage(run.path, work.images)
    return work.about


def write_cache_part(run: Run, config: RunConfig, made: Models, part: int, parts: int) -> int:
    """Make part number `part` (0 is the first) of `parts` of the run's cache, which `write_cache` publishes.

    Returns how many images the part has. `made` holds the trained encoder. Parts may be made at the same time, and
    while the run's folder is held: nothing in it is touched, and damaged images are noted down by `write_cache`.
    """
    shard_request.check_part(part, parts)
    with CountedProgress(f"cache, part {part + 1} of {parts}") as progress:
        return cache_build.write_part(Path(config.cache.folder), _work(run, config, made), part, parts, progress)


def _work(run: Run, config: RunConfig, made: Models) -> cache_build.Work:
    wanted, shards = about(run, config, made), open_shards(config, "train")

    def samples(start: int, stop: int) -> Iterator[latent_cache.CachedSample]:
        index = start
        for posterior in encode(config, made.encoder, shards, start, stop):
            for mean, logvar in zip(posterior.mean, posterior.logvar, strict=True):
                yield sample(config, made, wanted, index, Posterior(mean[None], logvar[None]))
                index += 1

    return cache_build.Work(wanted, config.evaluate.batch, shards, samples)


@torch.no_grad()
def sample(
    config: RunConfig, made: Models, wanted: latent_cache.CacheInfo, index: int, posterior: Posterior
) -> latent_cache.CachedSample:
    """What is kept of one image, whose posterior is (1, *latent)."""
    if not wanted.draws:
        return latent_cache.CachedSample(torch.cat([posterior.mean, posterior.logvar]).cpu().numpy(), [])
    noise = [rng.normal(config.seed, f"cached draw {draw}", [index], made.io.latent) for draw in range(wanted.draws)]
    z = posterior.sample(torch.cat(noise).to(posterior.mean.device))
    with torch.autocast(z.device.type, torch.bfloat16, enabled=wanted.precision == Precision.bf16.name):
        x_hat = to_uint8(made.encoder.decode(z).float())
    return latent_cache.CachedSample(z.cpu().numpy(), list(x_hat.permute(0, 2, 3, 1).cpu().contiguous().numpy()))


def cache_record(run: Run, config: RunConfig, made: Models) -> dict[str, float]:
    """Write the cache; returns the stage's record."""
    if (run.checkpoints("refiner")).exists() and any(run.checkpoints("refiner").iterdir()):
        raise UserError(
            f"run={run.path} has begun to train its refiner without a cache: leave cache out of stages=[...], or use "
            "another run="
        )
    began = time.perf_counter()
    made_of = write_cache(run, config, made)
    return {"seconds": time.perf_counter() - began, "images": made_of.images, "draws": made_of.draws}
