"""The order: an exact permutation every epoch, a pure function of its key."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvae.data.loading.order import Order
from dvae.errors import UserError

orders = st.builds(
    Order,
    count=st.integers(1, 300),
    seed=st.integers(0, 2**40),
    block=st.integers(1, 50),
    window=st.integers(1, 12),
)


@settings(deadline=None)
@given(orders, st.integers(0, 5))
def test_each_epoch_is_a_permutation(order: Order, epoch: int):
    indices = order.indices(epoch * order.count, (epoch + 1) * order.count)
    assert indices.dtype == np.int64
    assert np.array_equal(np.sort(indices), np.arange(order.count))


@settings(deadline=None)
@given(orders, st.integers(0, 700), st.lists(st.integers(0, 90), max_size=6))
def test_the_call_pattern_does_not_matter(order: Order, start: int, steps: list[int]):
    whole = order.indices(start, start + sum(steps))
    parts, at = [], start
    for step in steps:
        parts.append(order.indices(at, at + step))
        at += step
    assert np.array_equal(np.concatenate([*parts, []]), whole)


def test_epochs_and_seeds_differ():
    order = Order(count=1000, seed=1, block=16, window=8)
    first, second = order.indices(0, 1000), order.indices(1000, 2000)
    assert (first == second).mean() < 0.02
    assert (first == Order(count=1000, seed=2, block=16, window=8).indices(0, 1000)).mean() < 0.02


def test_a_window_reads_few_blocks():
    order = Order(count=10_000, block=100, window=5)
    for start in range(0, 10_000, 500):
        assert len(set(order.indices(start, start + 500) // 100)) == 5


def test_every_sample_can_come_first():
    """Over many epochs each sample's position is uniform: mean (n - 1) / 2, standard error 8.7 / sqrt(400)."""
    order = Order(count=30, block=7, window=2)
    positions = np.stack([np.argsort(order.indices(e * 30, (e + 1) * 30)) for e in range(400)])
    assert abs(positions.mean(0) - 14.5).max() < 5 * 8.66 / 20


def test_known_answer():
    """Runs resume across versions of NumPy only as long as this holds."""
    assert Order(count=10, seed=7, block=4, window=2).indices(0, 10).tolist() == [1, 3, 0, 2, 8, 9, 7, 5, 6, 4]


@pytest.mark.parametrize("field", ["count", "block", "window"])
def test_nothing_to_order(field: str):
    with pytest.raises(UserError, match=f"{field}=0"):
        Order(**{"count": 5, field: 0})
