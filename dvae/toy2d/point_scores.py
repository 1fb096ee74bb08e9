"""Score points by the sliced Wasserstein distance to true points, and compute its floor."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from dvae.evaluation.sliced_wasserstein import sliced_wasserstein, two_sample_floor
from dvae.registry.sources.base import StreamSource
from dvae.toy2d.points import true_points


def distances(sets: Sequence[torch.Tensor], true: torch.Tensor) -> dict[str, Any]:
    """Return the sliced Wasserstein distance of each set of points (n, 2) to the true points (see `summarize`)."""
    return summarize([sliced_wasserstein(points, true) for points in sets])


def floor(source: StreamSource, label: int | None, n: int) -> dict[str, Any]:
    """Return the distances between pairs of sets of n true points of a class (see `summarize`).

    On average, no model can have a smaller distance.
    """
    return summarize(two_sample_floor(lambda n, seed: true_points(source, label, n, seed), n))


def summarize(values: list[float]) -> dict[str, Any]:
    """Return the mean, the standard error of the mean (None for a single value), and the values."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": statistics.mean(values), "se": error, "values": values}
