"""Trials as processes of this machine, each with its share of cores and GPUs. They do not outlive the sweep."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dvae.errors import printable_line
from dvae.utils.machine import cores

PR_SET_PDEATHSIG = 1
"""Linux, prctl(2): the signal that a process gets when its parent ends."""


@dataclass
class RunningTrial:
    """A trial's process."""

    process: subprocess.Popen[bytes]
    log: Path
    began: float
    slot: int
    asked_to_stop: bool = False
    """Whether it was told to stop."""

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def last_line(self) -> str:
        """The last line of its log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
        return printable_line(next((line for line in reversed(lines) if line.strip()), "it said nothing"))


class TrialProcesses:
    """Starts at most `parallel` processes side by side, and tells which have ended.

    Where they have this machine's cores and GPUs in common (`shared`), each gets its part.
    """

    def __init__(self, parallel: int, shared: bool = True) -> None:
        self.parallel, self.shared = parallel, shared
        self.running: dict[int, RunningTrial] = {}

    def start(self, number: int, command: list[str], log: Path) -> None:
        """Start trial `number`, in the first free slot; what it says is added to its log."""
        taken = {running.slot for running in self.running.values()}
        slot = next(slot for slot in range(self.parallel) if slot not in taken)
        with log.open("ab") as out:
            process = subprocess.Popen(
                command,
                env=dict(os.environ) | (share(slot, self.parallel, os.environ, gpus()) if self.shared else {}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C reaches the sweep alone, which passes it on
                preexec_fn=end_with_parent(),
            )
        self.running[number] = RunningTrial(process, log, time.monotonic(), slot)

    def ended(self) -> dict[int, RunningTrial]:
        """Those that have ended since the last call."""
        gone = {number: running for number, running in self.running.items() if running.process.poll() is not None}
        for number in gone:
            del self.running[number]
        return gone

    def stop(self, number: int) -> None:
        """Ask a trial to save and end, once: a second signal would end it at once."""
        running = self.running[number]
        if not running.asked_to_stop:
            running.asked_to_stop = True
            running.process.terminate()

    def stop_all(self) -> None:
        """Ask all of them, and wait until they have saved and ended."""
        for number in self.running:
            self.stop(number)
        for running in self.running.values():
            running.process.wait()


def end_with_parent() -> Callable[[], None] | None:
    """What a child does first on Linux: have itself killed once this process is gone, even by SIGKILL."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before we asked
            os._exit(1)

    return ask


def share(slot: int, parallel: int, environment: Mapping[str, str], devices: list[str]) -> dict[str, str]:
    """Environment of the trial in `slot` of `parallel`: its part of the cores, and of the GPUs where there are any.

    With fewer GPUs than trials, several trials are on one. OMP_NUM_THREADS that is set already stays.
    """
    mine = {}
    if "OMP_NUM_THREADS" not in environment:
        mine["OMP_NUM_THREADS"] = str(max(1, cores() // parallel))
    if devices:
        mine["CUDA_VISIBLE_DEVICES"] = ",".join(devices[slot::parallel] or [devices[slot % len(devices)]])
    return mine


def gpus() -> list[str]:
    """GPUs that this process may use, by number or name; PyTorch is not asked, whose import takes seconds."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    return sorted((path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")), key=int)
