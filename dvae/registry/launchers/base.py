"""Launchers: ways to run a job. Each is a file in the folder launchers/."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Registry

DEFAULT = "local"
"""Name of the launcher if the settings of a run choose none."""


@dataclass(kw_only=True, slots=True)
class LauncherConfig(ComponentConfig):
    """Base class of the nested Config of every launcher."""

    hang_seconds: float = 900.0
    """Seconds without progress in training after which a rank counts as hanging, and the job ends (0: no limit)."""


class Launcher(ABC):
    """Runs the stages of a run folder on one or more ranks.

    It runs `dvae.runs.job.RunJob(folder)` on every rank, which reads the folder's config.yaml. Apart from that, each
    rank needs only the environment variables of torch.distributed: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT. A single rank needs none of them.

    Launchers must import large packages in `launch`, not at the top of their module. The module is imported whenever a
    config is composed.
    """

    Config: type[LauncherConfig] = LauncherConfig
    elsewhere = False
    """Whether the ranks run on other machines. `launch` then waits for them only if launcher.wait=true."""

    def __init__(self, config: Any) -> None:
        self.config = config
        if not config.hang_seconds >= 0:
            raise UserError(f"launcher.hang_seconds={config.hang_seconds:g}: use 0 (never) or more")

    @property
    @abstractmethod
    def ranks(self) -> int:
        """Number of ranks in training."""

    @abstractmethod
    def launch(self, folder: Path) -> None:
        """Run the stages of the run in `folder`, an absolute path or a path relative to the working directory.

        Returns when the run is finished, or when it was started on other machines. Raises UserError or MachineError if
        the run fails.
        """

    def can_attach(self, folder: Path) -> bool:
        """Return whether the run in `folder` was already started, and `attach` can wait for it."""
        return False

    def attach(self, folder: Path) -> None:
        """Wait for a run that was already started. Called only if `can_attach` returns True."""
        raise NotImplementedError(f"launcher {self.config.name!r} cannot wait for a run")

    def plan(self, folder: Path, stages: list[str]) -> str:
        """Return what `dry_run=true` prints about the launch, after the run's settings and stages."""
        return ""


LAUNCHERS: Registry[Launcher] = Registry("launcher", "dvae.launchers", Launcher, optional=True)


def launcher_of(config: ComponentConfig | None) -> Launcher:
    """Build the launcher from a run's `config.launcher`. Raises UserError if its settings are invalid."""
    config = config or LAUNCHERS.config({"name": DEFAULT})
    return LAUNCHERS.get(config.name)(config)
