"""Scores of points: sliced Wasserstein distances to true points, and the distance of two sets of true points."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from dvae.evaluation.sliced_wasserstein import sliced_wasserstein, two_sample_floor
from dvae.registry.sources.base import StreamSource
from dvae.toy2d.points import true_points


def distances(sets: Sequence[torch.Tensor], true: torch.Tensor) -> dict[str, Any]:
    """Sliced Wasserstein distance of each set of points (n, 2) to the true points, summarized."""
    return summarize([sliced_wasserstein(points, true) for points in sets])


def floor(source: StreamSource, label: int | None, n: int) -> dict[str, Any]:
    """Distances between two sets of n true points of a class, summarized: no model can do better on average."""
    return summarize(two_sample_floor(lambda n, seed: true_points(source, label, n, seed), n))


def summarize(values: list[float]) -> dict[str, Any]:
    """Mean, standard error (none of a single value) and the values."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": statistics.mean(values), "se": error, "values": values}
