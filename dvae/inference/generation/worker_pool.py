"""Generate chunks in several processes of this machine. Each process generates its own share of the chunks."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

from dvae.errors import MachineError, UserError
from dvae.inference.generation.chunk_worker import run_worker
from dvae.inference.generation.generation_settings import GenerationConfig
from dvae.inference.generation.task import GenerationTask
from dvae.utils.child_processes import Child, ChildGroup
from dvae.utils.machine import thread_share

ChunkCallback = Callable[[range | None], None]
"""on_chunk(range) is called when a chunk is stored, on_chunk(None) when a process has loaded the run."""
CONTINUE_HINT = "finished images are kept, run the same command again to continue"


def generate_in_processes(
    task_class: type[GenerationTask],
    settings: GenerationConfig,
    folder: Path,
    missing: list[range],
    on_chunk: ChunkCallback,
) -> None:
    """Generate the missing chunks in `settings.processes` processes, at most one per chunk.

    Each process builds `task_class(settings, device)`.

    Raises the error of the first process that fails, or MachineError with its signal or exit status. The other
    processes are killed.
    """
    count = min(settings.processes, len(missing))
    with ChildGroup() as workers:
        for number in range(count):
            arguments = (task_class, settings, folder, missing[number::count], number)
            workers.start_function(number, run_worker, *arguments, environment=thread_share(count))
        watch_workers(workers, on_chunk)


def watch_workers(workers: ChildGroup, on_chunk: ChunkCallback) -> None:
    """Wait until all workers have finished, and pass their messages to `on_chunk`."""
    ended = workers.wait(lambda worker: not worker.returned, on_message=lambda worker, message: on_chunk(message))
    for worker in ended:
        if not worker.returned:
            raise worker_error(worker)


def worker_error(worker: Child) -> UserError | MachineError:
    """Return the error that tells why a worker did not finish."""
    if worker.failure is None:
        status = worker.status or 0
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return MachineError(f"process {worker.number} {how}: {CONTINUE_HINT}")
    if worker.failure.status == UserError.exit_status:
        return UserError(worker.failure.message)
    return MachineError(f"process {worker.number}: {worker.failure.message}; {CONTINUE_HINT}")
