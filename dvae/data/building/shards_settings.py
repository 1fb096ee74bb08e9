"""Settings of `python tools/shards.py build`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass(kw_only=True, slots=True)
class ShardsConfig:
    """Settings of `python tools/shards.py build`."""

    source: Any = MISSING
    """Component that reads or draws the images; `python tools/components.py source` lists them."""
    size: int = 32
    """Height and width of every image, in pixels."""
    out: str = MISSING
    """Folder of the shards. It appears when it is complete."""
    heldout_fraction: float = 0.1
    """Fraction of the images that is held out from training."""
    channels: int = 3
    """Channels of every image: 3 (RGB) or 1 (gray)."""
    shard_size: int = 10_000
    """Number of source images that go into one training shard and one held-out shard."""
    workers: int = 2
    """Number of processes that render images. The shards do not depend on it."""
    max_bad_fraction: float = 0.01
    """Largest fraction of damaged images. They are listed and skipped; if there are more, the command fails."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import, which register components."""
    part: int | None = None
    """Build only this part, 0 to parts - 1, and publish nothing (null: build everything)."""
    parts: int = 1
    """Number of parts. Each part is built by a command of its own."""


ConfigStore.instance().store(name="shards_schema", node=ShardsConfig, provider="dvae")
