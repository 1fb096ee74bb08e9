"""All-pairs testing: few rows in which every two values that can meet do meet."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

Row = tuple[str, ...]


def pairs(row: Row) -> set[tuple[int, str, int, str]]:
    """Every two columns of a row with their values."""
    return {(i, row[i], j, row[j]) for i, j in combinations(range(len(row)), 2)}


def covering(candidates: Sequence[Row]) -> list[Row]:
    """Rows of `candidates` in which every pair occurs that occurs in any of them.

    Greedy: each time the first of those candidates that have the most pairs not seen yet.
    """
    of = {row: pairs(row) for row in candidates}
    missing: set[tuple[int, str, int, str]] = set().union(*of.values())
    chosen: list[Row] = []
    while missing:
        best = max(candidates, key=lambda row: len(of[row] & missing))
        chosen.append(best)
        missing -= of[best]
    return chosen
