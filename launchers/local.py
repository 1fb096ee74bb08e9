"""Run the job in this process, which may be one of several that torchrun started."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

from dvae import attempts
from dvae.job import Job


def launch(folder: Path) -> None:
    """Take the run folder through its stages; returns when they are finished."""
    name = "torchrun" if "RANK" in os.environ else "local"
    first = os.environ.get("RANK", "0") == "0"
    with attempts.recorded(folder, name, int(os.environ.get("WORLD_SIZE", "1"))) if first else nullcontext():
        Job(str(folder))()
