"""Sliced Wasserstein distance: closed forms, and what any distance obeys."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtri

from dvae.evaluation.sliced_wasserstein import sliced_wasserstein, two_sample_floor, wasserstein_squared


def normal(n: int, seed: int, d: int = 2) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


sizes = st.integers(1, 12)


@given(sizes, sizes, st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_unequal_sets_are_equal_ones_repeated(n: int, m: int, seed: int) -> None:
    """W2 of n and m points is that of m copies of each and n copies of each, which is a sum over sorted pairs."""
    a, b = normal(n, seed, 3), normal(m, seed + 1, 3)
    pairs = a.repeat(m, 1).sort(dim=0).values - b.repeat(n, 1).sort(dim=0).values
    torch.testing.assert_close(wasserstein_squared(a, b), pairs.square().mean(0))


def test_of_two_normals() -> None:
    """W2(N(0, 1), N(m, s^2))^2 = m^2 + (s - 1)^2; here on their quantiles."""
    q = torch.from_numpy(ndtri((np.arange(20_000) + 0.5) / 20_000))[:, None]
    assert wasserstein_squared(q, 0.3 + 1.7 * q).item() == pytest.approx(0.3**2 + 0.7**2, rel=1e-3)


def test_a_shift_counts_by_its_length() -> None:
    """Every projection moves by (e v), and the mean of (e v)^2 over unit vectors is |v|^2 / d."""
    a, v = normal(50, 0), torch.tensor([0.3, -0.4], dtype=torch.float64)
    assert sliced_wasserstein(a, a + v, directions=10_000) == pytest.approx(0.5 / math.sqrt(2), rel=0.02)
    three = normal(50, 0, 3)
    w = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    assert sliced_wasserstein(three, three + w, directions=10_000) == pytest.approx(3 / math.sqrt(3), rel=0.02)


def test_of_two_points() -> None:
    assert sliced_wasserstein(torch.zeros(1, 1), torch.full((1, 1), -2.5)) == pytest.approx(2.5)


@given(st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_it_is_a_distance(seed: int) -> None:
    a, b, c = normal(20, seed), normal(31, seed + 1) + 1, 2 * normal(20, seed + 2)
    assert sliced_wasserstein(a, a[torch.randperm(20)]) == pytest.approx(0, abs=1e-12)
    assert sliced_wasserstein(a, b) == pytest.approx(sliced_wasserstein(b, a))
    assert sliced_wasserstein(a, c) <= sliced_wasserstein(a, b) + sliced_wasserstein(b, c) + 1e-12
    assert sliced_wasserstein(3 * a, 3 * b) == pytest.approx(3 * sliced_wasserstein(a, b))


def test_the_floor_falls_with_the_size_of_the_sets() -> None:
    """About as n^(-1/2), and far above 0: it is what a perfect model scores."""
    few, many = (np.mean(two_sample_floor(normal, n)) for n in (200, 1800))
    assert 1.8 < few / many < 5.0
    assert len(set(two_sample_floor(normal, 50, repeats=3))) == 3
