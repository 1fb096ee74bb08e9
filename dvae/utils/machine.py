"""What this machine gives a process. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Mapping

THREADS = "OMP_NUM_THREADS"
"""The environment variable that sets the number of threads of OpenMP, and so of torch."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_share(count: int, environment: Mapping[str, str] = os.environ) -> dict[str, int]:
    """The variable that gives each of `count` processes its share of the cores; nothing if the user has set it."""
    return {} if THREADS in environment else {THREADS: max(1, cores() // count)}
