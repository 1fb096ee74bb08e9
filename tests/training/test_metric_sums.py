"""Metrics as sums and counts."""

from __future__ import annotations

import torch

from dvae.training.metric_sums import add_metric_sums, metric_means, metric_sums, metrics_by_time


def test_sums_of_all_parts_add_up() -> None:
    parts = [{"loss": (1.0, 2.0)}, {"loss": (3.0, 4.0), "loss_t3": (5.0, 1.0)}]
    assert add_metric_sums(parts) == {"loss": (4.0, 6.0), "loss_t3": (5.0, 1.0)}


def test_a_metric_without_samples_has_no_mean() -> None:
    sums = metric_sums({"loss": torch.tensor([1.0, 3.0]), "none": torch.zeros(0)})
    assert metric_means(sums) == {"loss": 2.0}


def test_each_tenth_of_the_time_has_its_own_sum() -> None:
    values, t = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.0, 0.1, 0.11, 1.0], dtype=torch.float64)
    assert metrics_by_time("loss", values, t) == {
        "loss_t0": (3.0, 2.0), "loss_t1": (4.0, 1.0), "loss_t9": (8.0, 1.0)
    }  # fmt: skip
