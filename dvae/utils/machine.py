"""What this machine gives a process. Imports nothing heavy."""

from __future__ import annotations

import multiprocessing
import os
import signal


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent() -> None:
    """Wait for the end of the process that started this one, and end this one too: also where that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
