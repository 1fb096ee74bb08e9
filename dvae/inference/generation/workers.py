"""Chunks drawn by several processes of this machine, each with its own share of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from dvae.errors import MachineError, UserError, describe, fold
from dvae.inference.generation.chunks import Chunks
from dvae.inference.generation.generation_settings import DrawingConfig
from dvae.inference.generation.task import GenerationTask
from dvae.utils.machine import cores, end_with_parent
from dvae.utils.secrets import guard_streams

After = Callable[[range | None], None]
"""after(chunk) once it is drawn; after(None) when a process has loaded the run."""
KEPT = "what is drawn is kept, the same command again goes on"


@dataclass
class Child:
    """One process, and the line in which it tells what it does."""

    number: int
    process: SpawnProcess
    line: connection.Connection


def draw(make: type[GenerationTask], settings: DrawingConfig, folder: Path, missing: list[range], after: After) -> None:
    """Have the missing chunks drawn in turn by `settings.processes` processes, no more than there are chunks.

    Each opens the run with make(settings, device).

    Raises what the first process to fail did, or MachineError with how it ended; the others are ended.
    """
    count = min(settings.processes, len(missing))
    children: list[Child] = []
    try:
        for number in range(count):
            children.append(start(make, settings, folder, missing[number::count], number, count))
        watch(children, after)
    finally:
        for child in children:
            child.process.kill()
            child.process.join()


def start(
    make: type[GenerationTask], settings: DrawingConfig, folder: Path, share: list[range], number: int, count: int
) -> Child:
    """Start one process, with its share of the cores."""
    context = multiprocessing.get_context("spawn")
    before = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))  # OpenMP reads it when it is loaded
    try:
        line, end = context.Pipe(duplex=False)
        arguments = (make, settings, folder, share, number, end)
        process = context.Process(target=run, args=arguments, name=f"process {number}")
        process.start()
        end.close()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return Child(number, process, line)


def run(
    make: type[GenerationTask],
    settings: DrawingConfig,
    folder: Path,
    share: list[range],
    number: int,
    line: connection.Connection,
) -> None:
    """What a process does: says None once it is ready, each chunk once it is kept, True at the end, or why it fails."""
    guard_streams()
    os.setpgrp()  # Ctrl-C reaches the command alone, which ends all
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        import torch

        from dvae.inference.generation.generate import generate_chunks
        from dvae.registry.discovery import load_plugins

        load_plugins(settings.plugins)
        gpus = torch.cuda.device_count()
        artist = make(settings, f"cuda:{number % gpus}" if gpus else "cpu")
        line.send(None)
        generate_chunks(artist, Chunks(folder), share, line.send)
        line.send(True)
    except BaseException as error:  # noqa: BLE001 told to the command, whatever it is
        words = describe(error)
        if words is None:
            traceback.print_exc()
        line.send(words or (f"{type(error).__name__}: {fold(error)}", MachineError.exit_status))
        sys.exit(1)


def watch(children: list[Child], after: After) -> None:
    """Wait until all have finished; tell of each chunk."""
    working = {child.line: child for child in children}
    while working:
        for line in connection.wait(list(working)):
            assert isinstance(line, connection.Connection)
            child = working[line]
            try:
                said = line.recv()
            except EOFError:  # without a last word
                child.process.join()
                status = child.process.exitcode or 0
                how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                raise MachineError(f"process {child.number} {how}: {KEPT}") from None
            if said is True:
                del working[line]
            elif isinstance(said, tuple):
                words, status = said
                if status == UserError.exit_status:
                    raise UserError(words)
                raise MachineError(f"process {child.number}: {words}; {KEPT}")
            else:
                after(said)
