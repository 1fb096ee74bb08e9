"""Open the shards of a run, and the data loader of a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    """Open a split of the run's shards. Images that the run has already found damaged are skipped."""
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
    all_ranks: bool = False,
) -> Loader | StreamLoader | SynchronizedLoader:
    """Open the data loader of a stage.

    Args:
        config: Settings of the run.
        training: Training settings of the stage.
        stage: Name of the stage. It is part of the random seeds.
        split: Split of the shards.
        images: Whether batches must hold images. If False, a loader of shards yields batches without them.
        all_ranks: Whether to load the whole batch, instead of this rank's share of it.
    """
    rank, world = (0, 1) if all_ranks else (ranks.rank(), ranks.world_size())
    common: dict[str, Any] = {
        "batch": training.batch,
        "rank": rank,
        "world": world,
        "accumulate": training.micro_batches,
        "seed": rng.child(config.seed, f"{stage} data"),
    }
    shards = None if configuration.uses_stream(config) else open_shards(config, split)
    if shards is None:
        loader: Loader | StreamLoader = StreamLoader(points.open_source(config), **common)
    else:
        order = Order(len(shards), rng.child(config.seed, f"{stage} order"), config.data.block, config.data.window)
        labels = shards.classes(config.data.label, config.classes) if config.classes else None
        data = config.data
        loader = Loader(shards, order, **common, flip=data.flip, labels=labels, threads=data.threads, images=images)
    if all_ranks:
        return loader
    return SynchronizedLoader(loader, shards, training, stage, Path(config.run), config.data.log_samples)
