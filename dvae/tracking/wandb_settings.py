"""The settings of Weights & Biases. Imports nothing heavy, because every command reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class WandbMode(Enum):
    """Whether and where W&B is used."""

    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases. Log in with `wandb login` or WANDB_API_KEY: a key has no place in a config."""

    mode: WandbMode = WandbMode.disabled
    """online, offline (files in the run folder; `wandb sync` sends them) or disabled."""
    project: str = "dvae"
    """Project of the run."""
    name: str | None = None
    """Name of the run; by default that of its folder."""
    entity: str | None = None
    """User or team; by default that of the login."""
    group: str | None = None
    """Group of the run; by default its recipe."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run."""
    bundle: bool = False
    """Upload the bundle as an artifact, after evaluation."""
