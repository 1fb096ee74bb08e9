"""The loader. For every global step it returns this rank's micro-batches, each with the keys of its samples."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import torch

from dvae.data.images import to_float
from dvae.data.loading.order import Order
from dvae.data.loading.prefetch import Prefetcher
from dvae.data.shards.reader import Shards
from dvae.errors import UserError
from dvae.utils import rng


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    keys: torch.Tensor
    """Global sample numbers, (B,), int64. All random draws for a sample are keyed by its number."""
    indices: torch.Tensor
    """Indices into the data set, (B,), int64."""
    images: torch.Tensor
    """(B, C, H, W): uint8, or float32 in [-1, 1] from an endless source. Shape (B, 0) if the stage needs no images."""
    labels: torch.Tensor | None = None
    """Classes, (B,), int64. None if the run has no classes."""

    def to_float(self) -> torch.Tensor:
        """Return the images as float32 in [-1, 1]."""
        return self.images if self.images.is_floating_point() else to_float(self.images)


class Batches(Protocol):
    """Training data of a stage: a `Loader`, or the `StreamLoader` of an endless source."""

    def step(self, sample: int) -> list[Batch]:
        """Return this rank's micro-batches of the global step that begins at global sample number `sample`."""
        ...


def check_batch(batch: int, ranks: int, micro_batches: int) -> int:
    """Return the number of samples in each micro-batch.

    Args:
        batch: Samples in a global batch.
        ranks: Number of ranks.
        micro_batches: Micro-batches of each rank in a step.

    Raises UserError if `batch` is not divisible by `ranks * micro_batches`. The message names the nearest valid sizes.
    """
    parts = ranks * micro_batches
    if batch < 1 or batch % parts:
        below = batch // parts * parts
        nearest = f"{below} or {below + parts}" if below > 0 else str(parts)
        raise UserError(
            f"batch {batch} does not divide into {ranks} ranks x {micro_batches} micro-batches: use {nearest}"
        )
    return batch // parts


class Loader:
    """Batches of a split, in the sequence that `order` defines.

    The global batch of a step that begins at sample number s is s, ..., s + batch - 1. It is cut into contiguous
    parts; micro-batch a of rank r is part a * world + r.

    Args:
        shards: The split to read.
        order: The sample order; it must have as many samples as `shards`.
        batch: Samples in a global batch.
        rank: This process's rank.
        world: Number of ranks.
        accumulate: Micro-batches of each rank in a step.
        flip: Whether to mirror each image horizontally with probability 1/2.
        labels: Classes of the split's images, (len(shards),).
        seed: Seed of the flips.
        threads: Threads that read the following steps ahead; 0 reads in the calling thread.
        prefetch: Number of steps to read ahead.
        images: Whether to read the images.
    """

    def __init__(
        self,
        shards: Shards,
        order: Order,
        batch: int,
        *,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        flip: bool = False,
        labels: torch.Tensor | None = None,
        seed: int = 0,
        threads: int = 0,
        prefetch: int = 2,
        images: bool = True,
    ) -> None:
        if order.count != len(shards):
            raise ValueError(f"the order is of {order.count} samples, the split has {len(shards)}")
        self._shards, self._order, self._batch = shards, order, batch
        self._part = check_batch(batch, world, accumulate)
        self._rank, self._world, self._accumulate = rank, world, accumulate
        self._flip, self._labels, self._seed, self._prefetch, self._images = flip, labels, seed, prefetch, images
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="loader") if threads else None
        self._ahead: dict[int, Future[list[Batch]]] = {}
        self._prefetcher = Prefetcher(shards.remote, shards.shards, order) if shards.remote and images else None

    def step(self, sample: int) -> list[Batch]:
        """Return this rank's micro-batches of the global step that begins at global sample number `sample`."""
        if self._prefetcher:
            self._prefetcher.at(sample)
        if self._pool is None:
            return self._load(sample)
        wanted = [sample + self._batch * i for i in range(self._prefetch + 1)]
        for start in [start for start in self._ahead if start not in wanted]:  # the caller did not continue in order
            self._ahead.pop(start).cancel()
        for start in wanted:
            if start not in self._ahead:
                self._ahead[start] = self._pool.submit(self._load, start)
        return self._ahead.pop(sample).result()

    def _load(self, sample: int) -> list[Batch]:
        return [self._micro_batch(sample, a) for a in range(self._accumulate)]

    def _micro_batch(self, sample: int, number: int) -> Batch:
        start = sample + (number * self._world + self._rank) * self._part
        keys = torch.arange(start, start + self._part)
        indices = self._order.indices(start, start + self._part)
        images = self._shards.read(indices) if self._images else torch.empty(self._part, 0, dtype=torch.uint8)
        if self._flip:
            flipped = rng.uniform(self._seed, "flip", keys.tolist()) < 0.5
            images[flipped] = images[flipped].flip(-1)
        labels = None if self._labels is None else self._labels[torch.from_numpy(self._shards.substituted(indices))]
        return Batch(keys, torch.from_numpy(indices), images, labels)

    def close(self) -> None:
        """Stop the threads and drop the batches that were read ahead."""
        if self._prefetcher:
            self._prefetcher.close()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._ahead.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
