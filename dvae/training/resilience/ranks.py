"""The ranks of a run, and functions with which they exchange small values and wait for each other.

A single process is rank 0 of 1. Then no function here waits or communicates.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dvae.errors import MachineError

T = TypeVar("T")
MAX_POLL_INTERVAL = 0.05
"""Largest time between two polls of the store, in seconds."""

_store: dist.Store | None = None
"""The store of the group, for everything that must not be a collective. None: this process is alone."""
_rendezvous_count = 0
"""Number of rendezvous of all ranks so far. It makes keys unique.

All ranks run the same program, so they count the same and agree on each key without communication."""


class PeerLost(MachineError):
    """Raised if another rank has ended, so this one cannot continue.

    The exit status 75 tells the launcher that this rank is not the cause.
    """

    exit_status = 75


def join() -> None:
    """Join the process group that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR, ...).

    Without RANK, create a group of one. Does nothing if the process is in a group already.
    """
    global _store
    if dist.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    if torch.cuda.is_available():  # before the group exists: NCCL uses the current device
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # init_process_group would make the store itself and hide it. Prefixes keep its keys apart from ours.
    store, number, count = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=number, world_size=count)
    _store = dist.PrefixStore("dvae", store)


def store_for(purpose: str) -> dist.Store:
    """The group's store, with its own connection and with a prefix for its keys.

    A connection takes one call at a time. So a thread that waits in a call would block all others on that connection.
    """
    return dist.HashStore() if _store is None else dist.PrefixStore(purpose, _store.clone())


def rank() -> int:
    """Number of this rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def on_rank_zero(work: Callable[..., T], *args: Any) -> T:
    """Call `work(*args)` on rank 0 only, and return its result on every rank. It must be picklable and small.

    The other ranks may wait for hours. They poll the store, because a collective would time out (gloo) or keep the
    device busy (nccl).
    """
    if world_size() == 1:
        return work(*args)
    store, key = _next_key("first")
    if rank() == 0:
        result = work(*args)
        store.set(key, pickle.dumps(result))  # type: ignore[arg-type] # its stub wants str
        return result
    _poll(lambda: store.check([key]))
    return pickle.loads(store.get(key))  # safe to unpickle: rank 0 of this run wrote it


def barrier() -> None:
    """Wait until every rank has called this. The wait may take hours, as in `on_rank_zero`."""
    if world_size() > 1:
        store, key = _next_key("barrier")
        store.add(key, 1)
        _poll(lambda: store.add(key, 0) == world_size())


def leave() -> None:
    """Announce that this rank is done. Rank 0 waits for all others, because its process may host the store."""
    if world_size() > 1:
        store, key = _next_key("leave")
        store.add(key, 1)
        if rank() == 0:
            _poll(lambda: store.add(key, 0) == world_size())


def all_gather(value: T) -> list[T]:
    """Return the `value` of every rank, in the order of ranks. Collective: every rank must call it."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_from_thread(key: str, value: T) -> list[T]:
    """Return the `value` of every rank on rank 0, in the order of ranks, and [] at once on the other ranks.

    Rank 0 waits until all ranks have called this. It is for background threads: they must not use collectives, because
    the main thread uses the process group at the same time. `key` must be unique within a run.
    """
    if world_size() == 1:
        return [value]
    assert _store is not None
    _store.set(f"{key} {rank()}", pickle.dumps(value))  # type: ignore[arg-type] # its stub wants str
    if rank():
        return []
    keys = [f"{key} {number}" for number in range(world_size())]
    _poll(lambda: _store.check(keys))
    return [pickle.loads(_store.get(one)) for one in keys]  # safe to unpickle: the ranks of this run wrote them


def any_rank(flag: bool) -> bool:
    """Return whether the flag of any rank is set. Collective: every rank must call it."""
    if world_size() == 1:
        return flag
    # An all-reduce of one number is cheap enough for every step; all_gather_object is not.
    wanted = torch.tensor(float(flag), device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(wanted, dist.ReduceOp.MAX)
    return bool(wanted.item())


@contextmanager
def translate_peer_loss() -> Iterator[None]:
    """Convert the errors that torch raises if another rank has ended (a broken connection) into PeerLost."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises a plain RuntimeError, so its message is the only sign.
        if world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise PeerLost(f"rank {rank()}: lost the connection to another rank ({error})") from error
        raise


def _next_key(purpose: str) -> tuple[dist.Store, str]:
    """The store, and the key for the next rendezvous of all ranks."""
    global _rendezvous_count
    assert _store is not None
    _rendezvous_count += 1
    return _store, f"{purpose} {_rendezvous_count}"


def _poll(done: Callable[[], bool]) -> None:
    """Wait until `done()` is true.

    It polls instead of waiting inside the store, because Python handles signals only between calls.
    """
    interval = 0.001
    while not done():
        time.sleep(interval)
        interval = min(2 * interval, MAX_POLL_INTERVAL)
