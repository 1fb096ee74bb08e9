"""The images of a run as its stages read them."""

from __future__ import annotations

from pathlib import Path

from dvae.config import compose as configuration
from dvae.config.schema import RunConfig, TrainingConfig
from dvae.data.loading.loader import Loader
from dvae.data.loading.order import Order
from dvae.data.loading.streams import StreamLoader
from dvae.data.shards.reader import Shards
from dvae.data.shards.remote import locate_shards
from dvae.toy2d import points
from dvae.tracking.console import say
from dvae.training.resilience import ranks
from dvae.training.resilience.damage_record import load_damaged
from dvae.training.resilience.sample_log import SynchronizedLoader
from dvae.utils import rng


def open_shards(config: RunConfig, split: str) -> Shards:
    """A split of the run's shards; what the run has found damaged is passed over from the start."""
    shards = Shards(
        locate_shards(config.data.shards, config.data.download_to, config.data.download_gib),
        split,
        cache_bytes=int(config.data.cache_gib * 2**30),
        max_bad_fraction=config.data.max_bad_fraction,
        report=say,
    )
    shards.add_damaged(load_damaged(Path(config.run), split))
    return shards


def open_loader(
    config: RunConfig,
    training: TrainingConfig,
    stage: str,
    split: str = "train",
    images: bool = True,
    whole: bool = False,
) -> Loader | StreamLoader | SynchronizedLoader:
    """Batches of a stage: this rank's share, or all of them (`whole`); without `images` where it can do without."""
    rank, world = (0, 1) if whole else (ranks.rank(), ranks.world_size())
    if configuration.uses_stream(config):
        shards = None
        loader: Loader | StreamLoader = StreamLoader(
            points.open_source(config),
            batch=training.batch,
            rank=rank,
            world=world,
            accumulate=training.micro_batches,
            seed=rng.child(config.seed, f"{stage} data"),
        )
    else:
        shards = open_shards(config, split)
        order = Order(len(shards), rng.child(config.seed, f"{stage} order"), config.data.block, config.data.window)
        loader = Loader(
            shards,
            order,
            batch=training.batch,
            rank=rank,
            world=world,
            accumulate=training.micro_batches,
            flip=config.data.flip,
            labels=shards.classes(config.data.label, config.classes) if config.classes else None,
            seed=rng.child(config.seed, f"{stage} data"),
            threads=config.data.threads,
            images=images,
        )
    return (
        loader
        if whole
        else SynchronizedLoader(loader, shards, training, stage, Path(config.run), config.data.log_samples)
    )
