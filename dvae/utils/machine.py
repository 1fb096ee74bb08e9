"""The CPU cores and threads of this machine. This module imports only the standard library."""

from __future__ import annotations

import os
from collections.abc import Mapping

THREADS = "OMP_NUM_THREADS"
"""The environment variable that sets the number of OpenMP threads, which PyTorch also uses."""


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_share(count: int, environment: Mapping[str, str] = os.environ) -> dict[str, int]:
    """Return the environment variable that divides the cores among `count` processes.

    The result is empty if the user has set the variable.
    """
    return {} if THREADS in environment else {THREADS: max(1, cores() // count)}
