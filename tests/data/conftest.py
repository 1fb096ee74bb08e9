"""The source of patterns, registered for these tests alone, and shards of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from patterns import Patterns

from dvae.data.building.shard_build import build
from dvae.registry.sources.base import SOURCES


@pytest.fixture(autouse=True)
def _patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enter the source for one test only: the registries are looked over by other tests."""
    monkeypatch.setitem(SOURCES._classes, "test_patterns", Patterns)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """50 patterns of 8x8 in shards of 7."""
    build({"name": "test_patterns"}, 8, tmp_path / "shards", 0.2, shard_size=7, workers=1)
    return tmp_path / "shards"
