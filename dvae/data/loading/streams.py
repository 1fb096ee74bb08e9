"""The loader of an endless source: its samples are drawn by number as they are needed, and none is met twice."""

from __future__ import annotations

from types import TracebackType

import torch

from dvae.data.loading.loader import Batch, check_batch
from dvae.registry.sources.base import StreamSource


class StreamLoader:
    """Batches of an endless source; samples are numbered and cut among ranks as `Loader` does it.

    Their images are float32 in [-1, 1], their indices the sample numbers.
    """

    def __init__(
        self,
        source: StreamSource,
        batch: int,
        *,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        seed: int = 0,
    ) -> None:
        self._source, self._seed = source, seed
        self._part = check_batch(batch, world, accumulate)
        self._rank, self._world, self._accumulate = rank, world, accumulate

    def step(self, sample: int) -> list[Batch]:
        """This rank's `accumulate` micro-batches of the global step that begins at global sample number `sample`."""
        return [
            self._micro_batch(sample + (a * self._world + self._rank) * self._part) for a in range(self._accumulate)
        ]

    def _micro_batch(self, start: int) -> Batch:
        numbers = range(start, start + self._part)
        keys = torch.arange(start, start + self._part)
        x, labels = self._source.sample(self._seed, numbers)
        return Batch(keys, keys, x, labels=labels)

    def close(self) -> None:
        """Nothing is held open."""

    def __enter__(self) -> StreamLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
