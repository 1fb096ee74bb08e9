"""Compute several metrics of sets of features, and check that there are enough images for each."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from dvae.errors import UserError
from dvae.evaluation import metrics
from dvae.evaluation.metrics import RNG_SEED, Features


class Metric(Enum):
    """Metrics of sets of images."""

    fid = "fid"
    """FID: distance between two Gaussians that are fitted to the features. 0 is best."""
    kid = "kid"
    """KID: unbiased squared maximum mean discrepancy of features, averaged over subsets.

    0 is best. Values below 0 are noise."""
    isc = "isc"
    """Inception score. Higher is better. It does not use real images."""
    prc = "prc"
    """Precision, the share of samples that lie among the real images; and recall, the share of real images that lie
    among the samples."""


@dataclass(frozen=True, kw_only=True)
class MetricSuite:
    """Metrics to compute, and their settings."""

    metrics: tuple[Metric, ...]
    suffix: str
    """Suffix of the names of metrics, from the extractor: "" or "-lite0"."""
    kid_subset_size: int
    """Number of images per subset of KID."""
    kid_subsets: int
    """Number of subsets of KID."""
    prc_neighborhood: int = 3
    """Precision and recall: the radius of an image's ball is the distance to its neighbor of this number."""
    isc_splits: int = 10
    """Number of parts of the images over which IS is averaged."""
    seed: int = RNG_SEED
    """Seed of KID's subsets, and of the order of images for IS."""

    def min_images(self, metric: Metric) -> int:
        """Smallest number of images that a set must have for a metric."""
        return {
            Metric.fid: 2,
            Metric.kid: self.kid_subset_size,
            Metric.isc: self.isc_splits,
            Metric.prc: self.prc_neighborhood + 1,
        }[metric]

    def check(self, what: str, count: int) -> None:
        """Raise UserError if a metric needs more images than `count`, the number of images of the set `what`."""
        for metric in self.metrics:
            if count < self.min_images(metric):
                raise UserError(
                    {
                        Metric.fid: f"FID needs two images or more, {what} has {count}: give more, or leave fid out",
                        Metric.kid: f"kid_subset_size={self.kid_subset_size} is more than the {count} images of "
                        f"{what}: use {count} or less",
                        Metric.isc: f"isc_splits={self.isc_splits} is more than the {count} images of {what}: use "
                        f"{count} or less",
                        Metric.prc: f"prc_neighborhood={self.prc_neighborhood} needs more images than that, {what} "
                        f"has {count}: use {count - 1} or less",
                    }[metric]
                )

    def figures(self, parts: Sequence[Features], against: Features) -> dict[str, Any]:
        """Compute the metrics of sets of features, one set per seed, against the real features `against`.

        Returns {"n", "n_reference", name of a metric: {"mean", "se", "per_seed", ...}}; se is the standard error. A
        metric for which a set is too small is left out.
        """
        smallest = min(len(part) for part in parts)
        found: dict[str, Any] = {"n": len(parts[0]), "n_reference": len(against)}
        for metric in self.metrics:
            enough = smallest if metric is Metric.isc else min(smallest, len(against))
            if enough >= self.min_images(metric):
                found |= {
                    f"{name}{self.suffix}": value for name, value in self._compute(metric, parts, against).items()
                }
        return found

    def _compute(self, metric: Metric, parts: Sequence[Features], against: Features) -> dict[str, Any]:
        """The values of one metric by name; precision and recall are two names."""
        if metric is Metric.fid:
            return {"FID": mean_over_seeds([metrics.fid(part.pooled, against.pooled) for part in parts])}
        if metric is Metric.kid:
            size, subsets = self.kid_subset_size, self.kid_subsets
            kids = [metrics.kid(part.pooled, against.pooled, size, subsets, self.seed) for part in parts]
            return {"KID": mean_over_seeds([mean for mean, _ in kids]) | {"subset_std": [std for _, std in kids]}}
        if metric is Metric.isc:
            scores = [metrics.isc(_logits(part), self.isc_splits, self.seed) for part in parts]
            return {"IS": mean_over_seeds([mean for mean, _ in scores]) | {"split_std": [std for _, std in scores]}}
        pairs = [metrics.prc(part.pooled, against.pooled, self.prc_neighborhood) for part in parts]
        return {
            "precision": mean_over_seeds([precision for precision, _ in pairs]),
            "recall": mean_over_seeds([recall for _, recall in pairs]),
        }

    def floor(self, real: Features, unseen: Features | None, n: int, seeds: int) -> dict[str, Any]:
        """Score real images as if they were samples. This is the score of a perfect model, or floor.

        Returns "heldout": up to `seeds` disjoint sets of at most `n` held-out images `unseen` against the reference
        `real`; and "reference halves": at most `n` images of the reference against the rest of it. Each is left out if
        it has too few images for every metric.
        """
        found = {}
        if unseen is not None and len(unseen):
            m = min(n, len(unseen))
            parts = [unseen[start : start + m] for start in range(0, len(unseen) - m + 1, m)]
            found["heldout"] = self.figures(parts[:seeds], real)
        m = min(n, len(real) // 2)
        if m:
            found["reference halves"] = self.figures([real[:m]], real[m:])
        return {name: figures for name, figures in found.items() if len(figures) > 2}


def _logits(features: Features) -> torch.Tensor:
    """The logits that IS needs. Raises UserError if the extractor has none."""
    if features.logits is None:
        raise UserError(
            "IS needs the standard Inception: give its weights, inception=FILE, or leave isc out of metrics"
        )
    return features.logits


def mean_over_seeds(values: list[float]) -> dict[str, Any]:
    """Mean, standard error of the mean (None for one seed), and the values."""
    se = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "se": se, "per_seed": values}
