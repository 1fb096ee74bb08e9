"""The main function of a worker process: generate its chunks and store them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from dvae.inference.generation.chunks import ChunkStore
from dvae.inference.generation.generation_settings import GenerationConfig
from dvae.inference.generation.task import GenerationTask
from dvae.registry.discovery import load_plugins


def run_worker(
    task_class: type[GenerationTask],
    settings: GenerationConfig,
    folder: Path,
    ranges: list[range],
    number: int,
    send: Callable[[range | None], None],
) -> None:
    """Generate the chunks `ranges` into `folder`, in a worker process.

    `number` is the worker's number; it selects the GPU. The worker calls `send(None)` when it has loaded the run, and
    `send(range)` when it has stored a chunk.
    """
    load_plugins(settings.plugins)
    gpus = torch.cuda.device_count()
    task = task_class(settings, f"cuda:{number % gpus}" if gpus else "cpu")
    send(None)
    ChunkStore(folder).fill(ranges, task.generate, send)
