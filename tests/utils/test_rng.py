"""Keyed draws: each is that of its own generator, whatever is drawn beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvae.utils import rng

numbers = st.lists(st.integers(0, 2**50), min_size=1, max_size=6)


@given(st.integers(0, 2**63), numbers, st.sampled_from([(), (3,), (2, 1, 1), (0,)]))
@settings(max_examples=30, deadline=None)
def test_rows_are_those_of_single_generators(seed: int, samples: list[int], shape: tuple[int, ...]) -> None:
    normal, uniform = rng.normal(seed, "x", samples, shape), rng.uniform(seed, "x", samples, shape)
    assert normal.shape == uniform.shape == (len(samples), *shape)
    assert (normal.dtype, uniform.dtype) == (torch.float32, torch.float64)
    for i, sample in enumerate(samples):
        one = rng.generator(seed, "x", sample).standard_normal(shape, dtype=np.float32)
        assert np.array_equal(normal[i].numpy(), one)
        assert np.array_equal(uniform[i].numpy(), rng.generator(seed, "x", sample).random(shape))


def test_seed_purpose_and_number_all_matter() -> None:
    draws = [rng.uniform(*key).item() for key in ((0, "a", [0]), (1, "a", [0]), (0, "b", [0]), (0, "a", [1]))]
    assert len(set(draws)) == 4


def test_moments() -> None:
    n = 4000
    assert rng.normal(0, "m", range(n), (2,)).mean().item() == pytest.approx(0, abs=5 / (2 * n) ** 0.5)
    assert rng.normal(0, "m", range(n), (2,)).std().item() == pytest.approx(1, abs=5 / (4 * n) ** 0.5)
    assert rng.uniform(0, "m", range(n)).mean().item() == pytest.approx(0.5, abs=5 * (1 / 12 / n) ** 0.5)
