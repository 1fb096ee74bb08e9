"""Measure how local an order's reads are and how well it shuffles. `block` and `window` trade one for the other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dvae.data.loading.order import Order
from dvae.utils.text_tables import markdown_table

SHARD = 10_000
"""Images per shard, the default of dvae.data.building.shard_build."""


@dataclass(frozen=True)
class Locality:
    """Measurements of one epoch of an order. Ratios compare it with a full permutation of the data set."""

    block: int
    """Number of consecutively stored samples that stay in one window."""
    window: int
    """Number of blocks whose samples are shuffled together."""
    blocks: int
    """Largest number of blocks in a window. A disk cache must hold this many to read each block only once."""
    held: float
    """Largest share of the data set in a window, in [0, 1]."""
    shards: float
    """Mean number of shards (of 10,000 images) from which a window is read."""
    distance: float
    """Mean storage distance between two samples of a batch, relative to a full permutation. 1 is best."""
    neighbors: float
    """Pairs of a batch stored less than `block` samples apart, relative to a full permutation. 1 is best."""
    spread: float
    """Variance of a class's count in a batch when storage is sorted by class, relative to a full permutation."""


def measure(order: Order, batch: int, classes: int = 10) -> Locality:
    """Measure the first epoch of `order` and compare it with a full permutation.

    `batch` is the number of samples in a batch. `classes` is the number of equal classes that `spread` assumes.
    """
    epoch = order.indices(0, order.count)
    rows = epoch[: len(epoch) // batch * batch].reshape(-1, batch)
    windows = np.array_split(epoch, range(order.block * order.window, order.count, order.block * order.window))
    share, near, mean = _full(order, batch, classes)
    label = rows * classes // order.count
    counts = np.stack([(label == value).sum(1) for value in range(classes)])
    pairs = np.abs(rows[:, :, None] - rows[:, None, :])[:, *np.triu_indices(batch, 1)]
    return Locality(
        block=order.block,
        window=order.window,
        blocks=max(len(np.unique(window // order.block)) for window in windows),
        held=max(len(window) for window in windows) / order.count,
        shards=float(np.mean([len(np.unique(window // SHARD)) for window in windows])),
        distance=float(pairs.mean()) / mean,
        neighbors=float((pairs < order.block).mean()) / near,
        spread=float(((counts - batch / classes) ** 2).mean()) / share,
    )


def _full(order: Order, batch: int, classes: int) -> tuple[float, float, float]:
    """Return the expected values for a full permutation.

    They are (variance, share, distance):

    - variance of a class's count in a batch, which is hypergeometric
    - share of pairs that are less than a block apart
    - mean distance of a pair, (n + 1) / 3
    """
    n, b = order.count, min(order.block, order.count)
    share = batch / classes * (1 - 1 / classes) * (n - batch) / (n - 1)
    near = sum(n - d for d in range(1, b)) / (n * (n - 1) / 2)
    return share, max(near, 1 / (n * (n - 1) / 2)), (n + 1) / 3


def table(count: int, batch: int, choices: list[tuple[int, int]]) -> str:
    """Measure several pairs (block, window) and return a Markdown table, for `count` samples in batches of `batch`."""
    header = [
        "block",
        "window",
        "samples in a window",
        "of the set",
        "shards of 10,000 per window",
        "distance",
        "spread",
    ]
    rows = []
    for block, window in choices:
        m = measure(Order(count, 0, block, window), batch)
        rows.append(
            [
                str(block), str(window), f"{round(m.held * count):,}", f"{100 * m.held:.1f}%", f"{m.shards:.1f}",
                f"{m.distance:.2f}", f"{m.spread:.2f}",
            ]
        )  # fmt: skip
    return markdown_table(header, rows)
