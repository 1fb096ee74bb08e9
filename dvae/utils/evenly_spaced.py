"""Evenly spaced indices."""

from __future__ import annotations

import numpy as np


def evenly_spaced(size: int, n: int, *, endpoint: bool = True) -> np.ndarray:
    """Up to n distinct indices of range(size), evenly spaced, in increasing order, int64. The first one is 0.

    With `endpoint` the last one is size - 1 (as in numpy.linspace), otherwise it is one spacing before `size`.
    """
    n = min(n, size)
    if endpoint:
        return np.unique(np.linspace(0, size - 1, n).round().astype(np.int64))
    return np.arange(n, dtype=np.int64) * size // max(n, 1)
