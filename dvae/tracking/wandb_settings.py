"""The settings of Weights & Biases. This module imports no large packages, because every command imports it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class WandbMode(Enum):
    """Whether W&B is used, and whether its data go to the server or to files."""

    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases. Log in with `wandb login` or WANDB_API_KEY; do not write the API key into a config."""

    mode: WandbMode = WandbMode.disabled
    """online, offline (files in the run folder, which `wandb sync` sends) or disabled."""
    project: str = "dvae"
    """W&B project of the run."""
    name: str | None = None
    """Name of the run in W&B (default: the name of the run folder)."""
    entity: str | None = None
    """W&B user or team (default: the default entity of the login)."""
    group: str | None = None
    """Group of the run in W&B (default: the name of the recipe)."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run in W&B."""
    bundle: bool = False
    """Upload the bundle as a W&B artifact after evaluation."""
