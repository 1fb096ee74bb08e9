"""Launchers: ways to run a job. Each is a file in the folder launchers/."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Registry

DEFAULT = "local"
"""The launcher of a config that names none."""


@dataclass(kw_only=True, slots=True)
class LauncherConfig(ComponentConfig):
    """What every launcher takes; the Config of each is one of these."""

    hang_seconds: float = 900.0
    """A rank that stands still for so many seconds, in training, ends the job (0: never)."""


class Launcher(ABC):
    """Takes a run folder through its stages, somewhere, on some number of ranks.

    It runs `dvae.runs.job.RunJob(folder)` on every rank, which reads the folder's config.yaml. Each rank needs nothing
    else but the variables of torch.distributed: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT (none of them
    if there is one rank).
    Heavy imports belong into `launch`: this module is imported to compose any config.
    """

    Config: type[LauncherConfig] = LauncherConfig
    elsewhere = False
    """Whether the ranks run on other machines than this one; then launcher.wait=true has `launch` wait for them."""

    def __init__(self, config: Any) -> None:
        self.config = config
        if not config.hang_seconds >= 0:
            raise UserError(f"launcher.hang_seconds={config.hang_seconds:g}: use 0 (never) or more")

    @property
    @abstractmethod
    def ranks(self) -> int:
        """How many there are in training."""

    @abstractmethod
    def launch(self, folder: Path) -> None:
        """Take the run in `folder`, relative to the working directory or not, through its stages.

        Returns when that is done, or under way elsewhere. Raises UserError or MachineError in one line where it failed.
        """

    def can_attach(self, folder: Path) -> bool:
        """Whether the run in `folder` is under way already, and `attach` would wait for it."""
        return False

    def attach(self, folder: Path) -> None:
        """Wait for a run that is under way. Called only if `can_attach` says that it can."""
        raise NotImplementedError(f"launcher {self.config.name!r} waits for no run")

    def plan(self, folder: Path, stages: list[str]) -> str:
        """What `dry_run=true` prints of it, beyond the config of the run and its stages."""
        return ""


LAUNCHERS: Registry[Launcher] = Registry("launcher", "dvae.launchers", Launcher, optional=True)


def launcher_of(config: ComponentConfig | None) -> Launcher:
    """The launcher that a run's `config.launcher` describes. Raises UserError where its settings are none."""
    config = config or LAUNCHERS.config({"name": DEFAULT})
    return LAUNCHERS.get(config.name)(config)
