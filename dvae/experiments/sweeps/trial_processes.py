"""Trials as processes of this machine, each with its share of cores and GPUs. They do not outlive the sweep."""

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
    slot: int
    asked_to_stop: bool = False

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def last_line(self) -> str:
        """The last line of its log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
        return printable_line(next((line for line in reversed(lines) if line.strip()), "it said nothing"))


class TrialProcesses:
    """Starts at most `parallel` processes side by side, and tells which have ended.

    If they have this machine's cores and GPUs in common (`shared`), each gets its part.
    """

    def __init__(self, parallel: int, shared: bool = True) -> None:
        self.parallel, self.shared = parallel, shared
        self.running: dict[int, RunningTrial] = {}
        self._children = ChildGroup()

    def start(self, number: int, command: list[str], log: Path) -> None:
        """Start trial `number`, in the first free slot; its output is added to its log."""
        taken = {running.slot for running in self.running.values()}
        slot = next(slot for slot in range(self.parallel) if slot not in taken)
        environment = machine_share(slot, self.parallel, os.environ, gpus()) if self.shared else {}
        child = self._children.start_program(number, command, log, environment)
        self.running[number] = RunningTrial(child, log, time.monotonic(), slot)

    def ended(self) -> dict[int, RunningTrial]:
        """Those that have ended since the last call."""
        return {child.number: self.running.pop(child.number) for child in self._children.ended()}

    def stop(self, number: int) -> None:
        """Ask a trial to save and end, once: a second signal would end it at once."""
        running = self.running[number]
        if not running.asked_to_stop:
            running.asked_to_stop = True
            running.process.send_signal(signal.SIGTERM)

    def stop_all(self) -> None:
        """Ask all of them, and wait until they have saved and ended."""
        for number in self.running:
            self.stop(number)
        for running in self.running.values():
            running.process.wait()


def machine_share(slot: int, parallel: int, environment: Mapping[str, str], devices: list[str]) -> dict[str, object]:
    """Environment of the trial in `slot` of `parallel`: its part of the cores, and of the GPUs if there are any.

    With fewer GPUs than trials, several trials share one. OMP_NUM_THREADS stays if it is set already.
    """
    threads: dict[str, object] = {**thread_share(parallel, environment)}
    if not devices:
        return threads
    return threads | {"CUDA_VISIBLE_DEVICES": ",".join(devices[slot::parallel] or [devices[slot % len(devices)]])}


def gpus() -> list[str]:
    """GPUs that this process may use, by number or name; PyTorch is not asked, whose import takes seconds."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    return sorted((path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")), key=int)
