"""The sample order: a keyed permutation of the data set for every epoch, local enough for fast reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dvae.errors import UserError
from dvae.utils import rng


@dataclass(frozen=True)
class Order:
    """Maps a global sample number g to an index of the data set. Every epoch, g // count, is one permutation.

    The data set is cut into blocks of consecutive samples. An epoch permutes the blocks and groups them into windows of
    `window` blocks. It then shuffles the samples within each window. Reads therefore touch few files at a time, and
    memory is O(window * block + number of blocks).

    The index is a pure function of the fields and g. It does not depend on ranks, workers or earlier calls.
    """

    count: int
    """Number of samples in the data set."""
    seed: int = 0
    """Seed of all permutations."""
    block: int = 256
    """Number of consecutive samples that stay in one window. The last block may be shorter."""
    window: int = 64
    """Number of blocks whose samples are shuffled together."""

    def __post_init__(self) -> None:
        for name in ("count", "block", "window"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} in the order of samples: use 1 or more")

    def indices(self, start: int, stop: int) -> np.ndarray:
        """Return the data set indices of the global sample numbers start, ..., stop - 1: (stop - start,), int64."""
        parts = [np.empty(0, np.int64)]
        while start < stop:
            parts.append(self.rest(start)[: stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def rest(self, start: int) -> np.ndarray:
        """Return the data set indices of the global sample numbers from `start` to the end of its window, int64."""
        epoch, position = divmod(start, self.count)
        _, starts = _layout(self, epoch)
        window = int(np.searchsorted(starts, position, side="right")) - 1
        return _window(self, epoch, window)[position - int(starts[window]) :]


def _permutation(seed: int, purpose: str, number: int, size: int) -> np.ndarray:
    # Sort raw bits instead of calling permutation(): only the raw stream is the same in all versions of NumPy.
    return np.argsort(rng.generator(seed, purpose, number).bit_generator.random_raw(size), kind="stable")


@lru_cache(maxsize=8)
def _layout(order: Order, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the epoch's sequence of blocks, and the position at which each window starts."""
    blocks = _permutation(order.seed, "order of blocks", epoch, -(-order.count // order.block))
    ends = np.cumsum(np.minimum(order.block, order.count - blocks * order.block))
    return blocks, np.concatenate([[0], ends[order.window - 1 : -1 : order.window]])


@lru_cache(maxsize=8)
def _window(order: Order, epoch: int, window: int) -> np.ndarray:
    """Return the data set indices of one window, in the epoch's order."""
    blocks, starts = _layout(order, epoch)
    mine = blocks[window * order.window : (window + 1) * order.window]
    samples = (mine[:, None] * order.block + np.arange(order.block)).ravel()
    samples = samples[samples < order.count]
    return samples[_permutation(order.seed, "order in window", epoch * len(starts) + window, len(samples))]
