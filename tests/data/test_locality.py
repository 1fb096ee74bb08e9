"""Locality and shuffling against closed forms."""

from __future__ import annotations

import pytest

from dvae.data.loading.locality import measure, table
from dvae.data.loading.order import Order


def test_one_window_over_all_is_a_full_permutation():
    found = measure(Order(20_000, 1, block=20_000, window=1), 50)
    assert found.held == 1
    assert found.distance == pytest.approx(1, abs=0.02)
    assert found.neighbors == pytest.approx(1, abs=0.02)
    assert found.spread == pytest.approx(1, abs=0.1)


def test_blocks_of_one_are_a_full_permutation():
    """Whatever the window: the blocks themselves are permuted over the whole set."""
    found = measure(Order(20_000, 1, block=1, window=100), 50)
    assert found.distance == pytest.approx(1, abs=0.02)
    assert found.spread == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("window", [4, 16])
def test_classes_stored_together_come_in_lumps(window: int):
    """A window of W of K blocks, each of one class: the share of a class in a batch of B varies with the drawn blocks
    too. Variance over that of a full permutation: 1 + (B - 1) / W * (1 - W / K), for blocks far larger than B."""
    blocks, batch = 100, 20
    found = measure(Order(100 * 1000, 1, block=1000, window=window), batch)
    assert found.spread == pytest.approx(1 + (batch - 1) / window * (1 - window / blocks), rel=0.3)
    assert found.blocks == window


def test_neighbors_within_a_single_block():
    """Window 1: all pairs of a batch lie within a block, as (2 K - 1) / K^2 of all pairs do, for K blocks."""
    found = measure(Order(40_000, 1, block=1000, window=1), 20)
    assert found.neighbors == pytest.approx(1 / ((2 * 40 - 1) / 40**2), rel=0.02)
    assert found.distance == pytest.approx(1000 / 40_000, rel=0.05)
    assert (found.held, found.shards) == (1 / 40, 1.0)


def test_a_row_each():
    assert len(table(5000, 20, [(10, 4), (50, 2)]).splitlines()) == 4
