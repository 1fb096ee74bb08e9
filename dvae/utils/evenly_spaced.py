"""Evenly spaced indices."""

from __future__ import annotations

import numpy as np


def evenly_spaced(size: int, n: int, *, endpoint: bool = True) -> np.ndarray:
    """Return min(n, size) evenly spaced indices of range(size), int64, in increasing order. The first one is 0.

    Args:
        size: The number of items to choose from.
        n: The number of indices.
        endpoint: If true, the last index is size - 1, as in numpy.linspace. Otherwise it is one spacing before `size`.
    """
    n = min(n, size)
    if endpoint:
        return np.unique(np.linspace(0, size - 1, n).round().astype(np.int64))
    return np.arange(n, dtype=np.int64) * size // max(n, 1)
