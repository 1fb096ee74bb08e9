"""Metrics as sums and counts, so that means over micro-batches, ranks and steps weight every sample equally."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

TIME_BUCKETS = 10
"""Number of equal intervals of t for which metrics are logged separately."""
MetricSums = dict[str, tuple[float, float]]
"""Metrics by name: (sum, count). The count of a metric for some samples only, such as an interval of t, is smaller."""


def metric_sums(metrics: Mapping[str, torch.Tensor]) -> MetricSums:
    """Sums and counts of per-sample metrics (B,)."""
    return {name: (float(values.detach().sum()), float(len(values))) for name, values in metrics.items()}


def metrics_by_time(name: str, values: torch.Tensor, t: torch.Tensor) -> MetricSums:
    """Sums and counts of a per-sample metric (B,) by tenths of t (B,).

    name_t0 is t in (0, 0.1], ..., name_t9 is t in (0.9, 1]. A tenth without samples is omitted.
    """
    bucket = (torch.ceil(t * TIME_BUCKETS).long() - 1).clamp(0, TIME_BUCKETS - 1)
    sums = torch.zeros(TIME_BUCKETS, dtype=torch.float64).index_add_(0, bucket, values.detach().double().cpu())
    counts = torch.bincount(bucket, minlength=TIME_BUCKETS)
    return {f"{name}_t{i}": (float(sums[i]), float(counts[i])) for i in range(TIME_BUCKETS) if counts[i]}


def add_metric_sums(parts: Iterable[MetricSums]) -> MetricSums:
    """Add up the sums and counts of all parts, in their order, which determines the rounding."""
    total: MetricSums = {}
    for part in parts:
        for name, (value, count) in part.items():
            before = total.get(name, (0.0, 0.0))
            total[name] = (before[0] + value, before[1] + count)
    return total


def metric_means(sums: MetricSums) -> dict[str, float]:
    """Mean of each metric whose count is not 0."""
    return {name: total / count for name, (total, count) in sums.items() if count}
