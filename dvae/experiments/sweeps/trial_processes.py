"""Run trials as processes on this machine, each with its share of cores and GPUs.

The processes end when the sweep ends.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dvae.errors import printable_line
from dvae.utils.child_processes import Child, ChildGroup
from dvae.utils.machine import thread_share


@dataclass
class RunningTrial:
    """A trial's process."""

    process: Child
    log: Path
    began: float
    """Start time in seconds, from time.monotonic()."""
    slot: int
    """Number of the process's share of the machine, from 0."""
    asked_to_stop: bool = False

    def seconds(self) -> float:
        """Return the seconds since the process started."""
        return time.monotonic() - self.began

    def last_line(self) -> str:
        """Return the last line of the log that is not blank."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
        return printable_line(next((line for line in reversed(lines) if line.strip()), "no output"))


class TrialProcesses:
    """Starts at most `parallel` processes at the same time, and reports which have ended.

    If the processes share this machine's cores and GPUs (`shared`), each gets its part of them.
    """

    def __init__(self, parallel: int, shared: bool = True) -> None:
        self.parallel, self.shared = parallel, shared
        self.running: dict[int, RunningTrial] = {}
        self._children = ChildGroup()

    def start(self, number: int, command: list[str], log: Path) -> None:
        """Start trial `number` in the first free slot. Its output is appended to `log`."""
        taken = {running.slot for running in self.running.values()}
        slot = next(slot for slot in range(self.parallel) if slot not in taken)
        environment = machine_share(slot, self.parallel, os.environ, gpus()) if self.shared else {}
        child = self._children.start_program(number, command, log, environment)
        self.running[number] = RunningTrial(child, log, time.monotonic(), slot)

    def ended(self) -> dict[int, RunningTrial]:
        """Return the trials that have ended since the last call, by number."""
        return {child.number: self.running.pop(child.number) for child in self._children.ended()}

    def stop(self, number: int) -> None:
        """Signal a trial to save and end. Only one signal is sent, because a second one would end it immediately."""
        running = self.running[number]
        if not running.asked_to_stop:
            running.asked_to_stop = True
            running.process.send_signal(signal.SIGTERM)

    def stop_all(self) -> None:
        """Signal all trials to save and end, and wait until they have ended."""
        for number in self.running:
            self.stop(number)
        for running in self.running.values():
            running.process.wait()


def machine_share(slot: int, parallel: int, environment: Mapping[str, str], devices: list[str]) -> dict[str, object]:
    """Return the environment variables that give the trial in `slot` of `parallel` its part of the cores and GPUs.

    If there are fewer GPUs than trials, several trials share a GPU. OMP_NUM_THREADS is kept if it is already set.
    """
    threads: dict[str, object] = {**thread_share(parallel, environment)}
    if not devices:
        return threads
    return threads | {"CUDA_VISIBLE_DEVICES": ",".join(devices[slot::parallel] or [devices[slot % len(devices)]])}


def gpus() -> list[str]:
    """Return the numbers or names of the GPUs that this process may use.

    This does not use PyTorch, because importing it takes seconds.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    return sorted((path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")), key=int)
