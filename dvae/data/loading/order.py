"""The order of the samples: a keyed permutation of the data set for every epoch, local enough for fast reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dvae.errors import UserError
from dvae.utils import rng


@dataclass(frozen=True)
class Order:
    """Maps a global sample number g to an index of the data set; every epoch (g // count) is one permutation.

    The data set is cut into blocks of consecutive samples; an epoch permutes the blocks, and shuffles the samples of
    `window` blocks in a row among themselves. So reads touch few files at a time, and memory is O(window * block +
    number of blocks). A pure function of the fields and g: ranks, workers and what was asked for before do not matter.
    """

    count: int
    """Samples in the data set."""
    seed: int = 0
    """Key of all permutations."""
    block: int = 256
    """Samples that stay in one window; the last block may be shorter."""
    window: int = 64
    """Blocks among whose samples an epoch shuffles."""

    def __post_init__(self) -> None:
        for name in ("count", "block", "window"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} in the order of samples: use 1 or more")

    def indices(self, start: int, stop: int) -> np.ndarray:
        """Data set indices of the global sample numbers start, ..., stop - 1: (stop - start,), int64."""
        parts = [np.empty(0, np.int64)]
        while start < stop:
            parts.append(self.rest(start)[: stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def rest(self, start: int) -> np.ndarray:
        """Data set indices of the global sample numbers from `start` to the end of its window."""
        epoch, position = divmod(start, self.count)
        _, starts = _layout(self, epoch)
        window = int(np.searchsorted(starts, position, side="right")) - 1
        return _window(self, epoch, window)[position - int(starts[window]) :]


def _permutation(seed: int, purpose: str, number: int, size: int) -> np.ndarray:
    # by sorting raw bits, since NumPy promises the same raw stream in all versions, but not the same permutation()
    return np.argsort(rng.generator(seed, purpose, number).bit_generator.random_raw(size), kind="stable")


@lru_cache(maxsize=8)
def _layout(order: Order, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The epoch's sequence of blocks, and the position at which each window of them starts."""
    blocks = _permutation(order.seed, "order of blocks", epoch, -(-order.count // order.block))
    ends = np.cumsum(np.minimum(order.block, order.count - blocks * order.block))
    return blocks, np.concatenate([[0], ends[order.window - 1 : -1 : order.window]])


@lru_cache(maxsize=8)
def _window(order: Order, epoch: int, window: int) -> np.ndarray:
    """Data set indices of one window, in the epoch's order."""
    blocks, starts = _layout(order, epoch)
    mine = blocks[window * order.window : (window + 1) * order.window]
    samples = (mine[:, None] * order.block + np.arange(order.block)).ravel()
    samples = samples[samples < order.count]
    return samples[_permutation(order.seed, "order in window", epoch * len(starts) + window, len(samples))]
