"""How local an order's reads are, and how well it shuffles: the two ends between which `block` and `window` choose."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dvae.data.loading.order import Order
from dvae.utils.text_tables import markdown_table

SHARD = 10_000
"""Images of a shard, as dvae.data.building.shard_build takes them by default."""


@dataclass(frozen=True)
class Locality:
    """Figures of one epoch of an order."""

    block: int
    """Samples stored side by side that stay in one window."""
    window: int
    """Blocks shuffled among themselves."""
    blocks: int
    """Different blocks from which a window is read: what a cache of the disk must hold to read each once."""
    held: float
    """Share of the data set that they are."""
    shards: float
    """Different shards (of 10,000) from which a window is read, on average."""
    distance: float
    """Mean distance in storage between two samples of a batch, over that of a full permutation: 1 is best."""
    neighbors: float
    """Pairs of a batch that are stored within `block` of each other, over those of a full permutation: 1 is best."""
    spread: float
    """Variance of a class's share in a batch where storage is sorted by class, over that of a full permutation."""


def measure(order: Order, batch: int, classes: int = 10) -> Locality:
    """Measure the first epoch of `order` in batches of `batch`, against the same figures of a full permutation."""
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
    """Of a full permutation: variance of a class's count in a batch (hypergeometric), share of pairs within a block's
    length of each other, mean distance of a pair ((n + 1) / 3)."""
    n, b = order.count, min(order.block, order.count)
    share = batch / classes * (1 - 1 / classes) * (n - batch) / (n - 1)
    near = sum(n - d for d in range(1, b)) / (n * (n - 1) / 2)
    return share, max(near, 1 / (n * (n - 1) / 2)), (n + 1) / 3


def table(count: int, batch: int, choices: list[tuple[int, int]]) -> str:
    """The figures of several (block, window) as a Markdown table."""
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
