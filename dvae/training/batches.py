"""The images of a run as its stages read them."""

from __future__ import annotations

from pathlib import Path

from dvae import config as configuration
from dvae import keyed, points
from dvae.data.endless import EndlessLoader
from dvae.data.loader import Loader
from dvae.data.order import Order
from dvae.data.reader import Shards
from dvae.settings import RunConfig, TrainingConfig
from dvae.training import ranks


def open_shards(config: RunConfig, split: str) -> Shards:
    return Shards(
        Path(config.data.shards),
        split,
        cache_bytes=int(config.data.cache_gib * 2**30),
        max_bad_fraction=config.data.max_bad_fraction,
    )


def open_loader(
    config: RunConfig,
    training: TrainingConfig,
    stage: str,
    split: str = "train",
    images: bool = True,
    whole: bool = False,
) -> Loader | EndlessLoader:
    """Batches of a stage: this rank's share, or all of them (`whole`); without `images` where it can do without."""
    rank, world = (0, 1) if whole else (ranks.rank(), ranks.world_size())
    if configuration.endless(config):
        return EndlessLoader(
            points.open_source(config),
            batch=training.batch,
            rank=rank,
            world=world,
            accumulate=training.micro_batches,
            seed=keyed.child(config.seed, f"{stage} data"),
        )
    shards = open_shards(config, split)
    order = Order(len(shards), keyed.child(config.seed, f"{stage} order"), config.data.block, config.data.window)
    return Loader(
        shards,
        order,
        batch=training.batch,
        rank=rank,
        world=world,
        accumulate=training.micro_batches,
        flip=config.data.flip,
        labels=shards.classes(config.data.label, config.classes) if config.classes else None,
        seed=keyed.child(config.seed, f"{stage} data"),
        threads=config.data.threads,
        images=images,
    )
