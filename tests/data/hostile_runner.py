"""Read hostile files in a process of its own, which is watched: time, memory, processes that it starts, connections."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from hostile_files import MARK, PIXELS
from hostile_shards import HOSTILE, READERS, Hostile
from memory_support import forget_peak, status

SECONDS = 10
"""For a case, at most."""
MEMORY = 1536 * 2**20
"""Bytes that a case may take, at most: a manifest of 32 MiB may take 25 times as many."""
WATCHED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "socket.connect")
"""Audit events that no case may raise."""


@dataclass(frozen=True)
class Outcome:
    """What came of a case."""

    pixels: bool = False
    """Whether the pixels that were written were read."""
    error: str = ""
    """Type and message of what was raised."""
    memory: int = 0
    """Bytes that it took at the most."""
    seen: tuple[str, ...] = ()
    """Watched events, lines that were printed, and traces of what was executed."""


def outcomes(kind: str) -> dict[str, Outcome]:
    """What came of all cases of a kind, by name; a case that ended the process has how it ended as its error."""
    found: dict[str, Outcome] = {}
    cases = [case for case in HOSTILE if case.kind == kind]
    while missing := [case.name for case in cases if case.name not in found]:
        line, end = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(target=_run, args=(kind, missing, end))
        process.start()
        end.close()
        try:
            while True:
                name, outcome = line.recv()
                found[name] = outcome
        except EOFError:
            process.join()
        left = [name for name in missing if name not in found]
        if left:
            found[left[0]] = Outcome(error=f"the process ended with status {process.exitcode}")
    return found


def _run(kind: str, names: list[str], end: Connection) -> None:
    seen: list[str] = []
    warnings.showwarning = lambda *args, **more: seen.append(f"warning {args[0]}")
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        cases = {case.name: case for case in HOSTILE if case.kind == kind}
        _warm_up(kind)
        sys.addaudithook(lambda event, _: seen.append(event) if event in WATCHED else None)
        limit = status("VmSize") + 2 * MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.signal(signal.SIGALRM, _late)
        for name in names:
            seen.clear()
            end.send((name, _outcome(cases[name], seen)))


def _warm_up(kind: str) -> None:
    """Import and allocate what any case needs, so that it is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        sound = next((case for case in HOSTILE if case.kind == kind and case.sound), None)
        if sound is not None:
            READERS[kind](sound.write(Path(folder)))


def _late(*_: Any) -> None:
    raise TimeoutError(f"not done after {SECONDS} seconds")


def _outcome(case: Hostile, seen: list[str]) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        place = case.write(Path(folder))
        seen.clear()  # of what was written
        before = forget_peak()
        error, right = "", False
        signal.alarm(SECONDS)
        try:
            found = READERS[case.kind](place)
            right = np.array_equal(found, PIXELS)
        except BaseException as raised:  # noqa: BLE001 told to the test, whatever it is
            kind = type(raised).__name__
            known = kind in ("UserError", "MachineError", "DamagedFile")
            error = f"{kind}: {raised}" if known else f"{kind}: {traceback.format_exc()}"
        finally:
            signal.alarm(0)
        memory = status("VmHWM") - before
    traces = [path.name for path in Path.cwd().iterdir() if path.name == MARK]
    return Outcome(right, error, memory, (*seen, *traces))
