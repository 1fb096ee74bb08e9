"""Evenly spaced indices, by hand."""

from __future__ import annotations

import numpy as np

from dvae.utils.evenly_spaced import evenly_spaced


def test_both_ends_are_included() -> None:
    assert evenly_spaced(9, 3).tolist() == [0, 4, 8]
    assert evenly_spaced(10, 4).tolist() == [0, 3, 6, 9]
    assert evenly_spaced(5, 1).tolist() == [0]


def test_without_the_endpoint_the_gap_at_the_end_is_as_wide_as_the_others() -> None:
    assert evenly_spaced(9, 3, endpoint=False).tolist() == [0, 3, 6]
    assert evenly_spaced(10, 4, endpoint=False).tolist() == [0, 2, 5, 7]


def test_no_index_comes_twice() -> None:
    for endpoint in (True, False):
        assert evenly_spaced(3, 9, endpoint=endpoint).tolist() == [0, 1, 2]
        assert evenly_spaced(0, 4, endpoint=endpoint).tolist() == []
        assert evenly_spaced(4, 0, endpoint=endpoint).tolist() == []
        assert evenly_spaced(4, 2, endpoint=endpoint).dtype == np.int64
