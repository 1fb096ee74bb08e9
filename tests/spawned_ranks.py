"""Several ranks in processes of their own, as tests need them: without a launcher."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing
from torch.distributed import TCPStore


def on_ranks(count: int, work: Callable[..., None], *args: Any) -> None:
    """Run `work(rank, *args)`, a function of a module, on so many ranks of one thread each that have joined a group."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(_rank, (count, store.port, work, args), nprocs=count)


def _rank(number: int, count: int, port: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    from dvae.training.engine.deepspeed_engine import start_distributed

    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(1)
    start_distributed()
    work(number, *args)
