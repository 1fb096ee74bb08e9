"""Run tools/launch.py in a separate process, for commands that train several runs one after the other."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence

from dvae.utils import package
from dvae.utils.child_processes import parent_death_signal


def launch(overrides: Sequence[str]) -> int:
    """Train a run in a separate process and return its exit status.

    A negative status is the number of the signal that ended the process. The process saves and ends on Ctrl-C, which
    it receives too. On Linux it also does so if this process is killed.
    """
    program = str(package.FOLDER / "tools" / "launch.py")
    return subprocess.run(
        [sys.executable, program, *overrides], preexec_fn=parent_death_signal(signal.SIGTERM)
    ).returncode
