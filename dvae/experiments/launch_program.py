"""Run tools/launch.py in a process of its own, for commands that train several runs one after the other."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence

from dvae.utils import package
from dvae.utils.child_processes import parent_death_signal


def launch(overrides: Sequence[str]) -> int:
    """Train a run; returns the exit status, below 0 the signal that ended the process.

    Ctrl-C reaches the process too, which then saves; so it does if this process is killed (Linux).
    """
    program = str(package.FOLDER / "tools" / "launch.py")
    return subprocess.run(
        [sys.executable, program, *overrides], preexec_fn=parent_death_signal(signal.SIGTERM)
    ).returncode
