"""Run the job in this process, which may be one of several that torchrun started."""

from __future__ import annotations

from pathlib import Path

from dvae.job import Job


def launch(folder: Path) -> None:
    """Take the run folder through its stages; returns when they are finished."""
    Job(str(folder))()
