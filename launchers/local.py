"""Run the job in this process, which may be one of several processes of torchrun."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from dvae.registry.launchers.base import LAUNCHERS, Launcher, LauncherConfig
from dvae.runs import attempts


@LAUNCHERS.register("local")
class Local(Launcher):
    """Runs the job in this process, which may be one of several processes of torchrun."""

    @dataclass(kw_only=True, slots=True)
    class Config(LauncherConfig):
        pass

    @property
    def ranks(self) -> int:
        return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1

    def launch(self, folder: Path) -> None:
        from dvae.runs.job import RunJob  # here, because importing DeepSpeed takes seconds

        name = "torchrun" if "RANK" in os.environ else "local"
        first = os.environ.get("RANK", "0") == "0"
        with attempts.recorded(folder, name, self.ranks) if first else nullcontext():
            RunJob(str(folder))()
