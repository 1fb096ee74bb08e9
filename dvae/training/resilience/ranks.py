"""Several processes as one: who is who, and the few ways in which ranks wait for each other.

A process alone is rank 0 of 1: there, nothing here waits or communicates.
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
"""Seconds between two polls of the store, at most."""

_store: dist.Store | None = None
_rendezvous_count = 0
"""How often the ranks have met at the store. It is the same on every rank, since all run the same program."""


class PeerLost(MachineError):
    """Another rank is gone, so this one cannot go on. The exit status 75 says that it is not this rank's own fault."""

    exit_status = 75


def join() -> None:
    """Join the group that the environment names (RANK, WORLD_SIZE, MASTER_ADDR, ...), or be a group of one."""
    global _store
    if dist.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, number, count = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=number, world_size=count)
    _store = dist.PrefixStore("dvae", store)


def store_for(purpose: str) -> dist.Store:
    """The group's store for the keys of one purpose, on a connection of its own: each takes one call at a time."""
    return dist.HashStore() if _store is None else dist.PrefixStore(purpose, _store.clone())


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def on_rank_zero(work: Callable[..., T], *args: Any) -> T:
    """What `work(*args)` returns on rank 0, which alone does it; the others wait, for hours if need be.

    They wait at the store and not in a collective, which would give up (gloo) or keep a device busy (nccl). What is
    returned must be picklable and small.
    """
    if world_size() == 1:
        return work(*args)
    store, key = _next_key("first")
    if rank() == 0:
        result = work(*args)
        store.set(key, pickle.dumps(result))  # type: ignore[arg-type] # its stub wants str
        return result
    _poll(lambda: store.check([key]))
    return pickle.loads(store.get(key))  # written by rank 0 of this very run


def barrier() -> None:
    """Wait, for hours if need be, until every rank is here."""
    if world_size() > 1:
        store, key = _next_key("barrier")
        store.add(key, 1)
        _poll(lambda: store.add(key, 0) == world_size())


def leave() -> None:
    """The end: rank 0, which may be the store's host, is the last to go."""
    if world_size() > 1:
        store, key = _next_key("leave")
        store.add(key, 1)
        if rank() == 0:
            _poll(lambda: store.add(key, 0) == world_size())


def all_gather(value: T) -> list[T]:
    """The `value` of every rank, in their order; collective."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_from_thread(key: str, value: T) -> list[T]:
    """Rank 0: the `value` of every rank, in their order, once all have handed one in; the others: nothing, at once.

    For a thread beside the training, since nothing here is collective. `key` may be used once.
    """
    if world_size() == 1:
        return [value]
    assert _store is not None
    _store.set(f"{key} {rank()}", pickle.dumps(value))  # type: ignore[arg-type] # its stub wants str
    if rank():
        return []
    keys = [f"{key} {number}" for number in range(world_size())]
    _poll(lambda: _store.check(keys))
    return [pickle.loads(_store.get(one)) for one in keys]  # written by the ranks of this very run


def any_rank(flag: bool) -> bool:
    """Whether any rank's flag is set; collective, one number wide."""
    if world_size() == 1:
        return flag
    wanted = torch.tensor(float(flag), device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(wanted, dist.ReduceOp.MAX)
    return bool(wanted.item())


@contextmanager
def translate_peer_loss() -> Iterator[None]:
    """Turn what torch raises when a rank is gone (a broken connection) into Lost."""
    try:
        yield
    except RuntimeError as error:
        if world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise PeerLost(f"rank {rank()}: lost the connection to another rank ({error})") from error
        raise


def _next_key(purpose: str) -> tuple[dist.Store, str]:
    """The store, and a key of it for the next rendezvous of all ranks."""
    global _rendezvous_count
    assert _store is not None
    _rendezvous_count += 1
    return _store, f"{purpose} {_rendezvous_count}"


def _poll(done: Callable[[], bool]) -> None:
    """Return once `done()`. Between polls Python runs, so that signals are handled."""
    interval = 0.001
    while not done():
        time.sleep(interval)
        interval = min(2 * interval, MAX_POLL_INTERVAL)
