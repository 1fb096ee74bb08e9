"""Metrics of sets of features, with their settings and the number of images that each metric needs."""

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
    """What sets of images are scored by."""

    fid = "fid"
    """Distance of two Gaussians that are fitted to the features; 0 is best."""
    kid = "kid"
    """Unbiased squared maximum mean discrepancy of features, a mean over subsets; 0 is best, less is noise."""
    isc = "isc"
    """Inception Score; greater is better. Looks at the images alone."""
    prc = "prc"
    """Precision and recall: the share of samples among the real images, and of real images among the samples."""


@dataclass(frozen=True, kw_only=True)
class MetricSuite:
    """Metrics and their settings. `suffix` ends the names of the figures, as the extractor has it."""

    metrics: tuple[Metric, ...]
    suffix: str
    kid_subset_size: int
    kid_subsets: int
    prc_neighborhood: int = 3
    isc_splits: int = 10
    seed: int = RNG_SEED

    def min_images(self, metric: Metric) -> int:
        """Images that a set must have at least."""
        return {
            Metric.fid: 2,
            Metric.kid: self.kid_subset_size,
            Metric.isc: self.isc_splits,
            Metric.prc: self.prc_neighborhood + 1,
        }[metric]

    def check(self, what: str, count: int) -> None:
        """Raise UserError where a metric needs more images than the `count` of `what` has."""
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
        """The figures of sets of features, one per seed, against real ones: name -> mean, standard error, per seed.

        A metric for which a set is too small is left out.
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
        """Real images scored as if they were a set of `n`: what a perfect model would score.

        "heldout": up to `seeds` disjoint parts of images that are none of the reference; "reference halves": part of
        the reference against its rest. Only where there are enough images for one metric that is a distance.
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
    if features.logits is None:
        raise UserError(
            "IS needs the standard Inception: give its weights, inception=FILE, or leave isc out of metrics"
        )
    return features.logits


def mean_over_seeds(values: list[float]) -> dict[str, Any]:
    """Mean, standard error (null for one seed) and the values themselves."""
    se = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "se": se, "per_seed": values}
