"""What one of several worker processes does: generate its chunks and keep them."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from dvae.errors import MachineError, describe, fold
from dvae.inference.generation.chunks import ChunkStore
from dvae.inference.generation.generation_settings import GenerationConfig
from dvae.inference.generation.task import GenerationTask
from dvae.registry.discovery import load_plugins
from dvae.utils.machine import end_with_parent
from dvae.utils.secrets import guard_streams


def run_worker(
    task_class: type[GenerationTask],
    settings: GenerationConfig,
    folder: Path,
    ranges: list[range],
    number: int,
    connection: Connection,
) -> None:
    """The main function of a worker process, which reports to the command through `connection`.

    It sends None once it is ready, each chunk's range once the chunk is kept, True at the end, or why it fails: a
    message and an exit status.
    """
    guard_streams()
    os.setpgrp()  # Ctrl-C reaches the command alone, which ends all
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        load_plugins(settings.plugins)
        gpus = torch.cuda.device_count()
        task = task_class(settings, f"cuda:{number % gpus}" if gpus else "cpu")
        connection.send(None)
        ChunkStore(folder).fill(ranges, task.generate, connection.send)
        connection.send(True)
    except BaseException as error:  # noqa: BLE001 told to the command, whatever it is
        failure = describe(error)
        if failure is None:
            traceback.print_exc()
        connection.send(failure or (f"{type(error).__name__}: {fold(error)}", MachineError.exit_status))
        sys.exit(1)
