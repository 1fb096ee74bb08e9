"""Generate chunks in several processes of this machine, each with its own share of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from dvae.errors import MachineError, UserError
from dvae.inference.generation.chunk_worker import run_worker
from dvae.inference.generation.generation_settings import GenerationConfig
from dvae.inference.generation.task import GenerationTask
from dvae.utils.machine import cores

ChunkCallback = Callable[[range | None], None]
"""on_chunk(range) once a chunk is kept; on_chunk(None) when a process has loaded the run."""
CONTINUE_HINT = "what is drawn is kept, the same command again goes on"


@dataclass
class WorkerProcess:
    """One process, and the end of the pipe on which it reports."""

    number: int
    process: SpawnProcess
    connection: connection.Connection


def generate_in_processes(
    task_class: type[GenerationTask],
    settings: GenerationConfig,
    folder: Path,
    missing: list[range],
    on_chunk: ChunkCallback,
) -> None:
    """Generate the missing chunks in `settings.processes` processes, no more than there are chunks.

    Each process opens the run with task_class(settings, device).

    Raises the error of the first process that fails, or MachineError with how it ended; the others are killed.
    """
    count = min(settings.processes, len(missing))
    workers: list[WorkerProcess] = []
    try:
        for number in range(count):
            workers.append(start_worker(task_class, settings, folder, missing[number::count], number, count))
        watch_workers(workers, on_chunk)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()


def start_worker(
    task_class: type[GenerationTask],
    settings: GenerationConfig,
    folder: Path,
    ranges: list[range],
    number: int,
    count: int,
) -> WorkerProcess:
    """Start process `number` of `count`, with its share of the cores."""
    context = multiprocessing.get_context("spawn")
    before = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))  # OpenMP reads it when it is loaded
    try:
        receiver, sender = context.Pipe(duplex=False)
        arguments = (task_class, settings, folder, ranges, number, sender)
        process = context.Process(target=run_worker, args=arguments, name=f"process {number}")
        process.start()
        sender.close()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return WorkerProcess(number, process, receiver)


def watch_workers(workers: list[WorkerProcess], on_chunk: ChunkCallback) -> None:
    """Wait until all have finished, and pass their reports to `on_chunk`."""
    running = {worker.connection: worker for worker in workers}
    while running:
        for receiver in connection.wait(list(running)):
            assert isinstance(receiver, connection.Connection)
            worker = running[receiver]
            try:
                message = receiver.recv()
            except EOFError:  # it ended without a report
                raise _ended_early(worker) from None
            if message is True:
                del running[receiver]
            elif isinstance(message, tuple):
                text, status = message
                if status == UserError.exit_status:
                    raise UserError(text)
                raise MachineError(f"process {worker.number}: {text}; {CONTINUE_HINT}")
            else:
                on_chunk(message)


def _ended_early(worker: WorkerProcess) -> MachineError:
    worker.process.join()
    status = worker.process.exitcode or 0
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return MachineError(f"process {worker.number} {how}: {CONTINUE_HINT}")
