"""Fetching shards that lie elsewhere before the order of samples wants them."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import numpy as np

from dvae.data.loading.order import Order
from dvae.data.shards.manifest import Shard
from dvae.data.shards.remote import RemoteShards
from dvae.errors import MachineError, UserError

AGAIN_AFTER = 30.0
"""Seconds after a fetch that failed before the next."""


class Prefetcher:
    """A thread that keeps the shards which the order wants next in the folder of `remote`, as many as fit there.

    With several processes on a folder each has such a thread, and each file is fetched by one of them. A fetch that
    fails here is tried again; whoever reads the shard meanwhile tries too, and says what is wrong.
    """

    def __init__(self, remote: RemoteShards, shards: Sequence[Shard], order: Order) -> None:
        """Raises UserError where the folder may not hold the shards of one window of the order."""
        self._remote, self._shards, self._order = remote, shards, order
        self._starts = np.cumsum([0, *(shard.count for shard in shards)])
        refuse_small(remote, shards, order)
        self._sample, self._until = 0, 0
        self._stop, self._moved = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def at(self, sample: int) -> None:
        """Training reads global sample number `sample` now."""
        if not self._sample <= sample < self._until:  # another window
            self._sample, self._until = sample, sample + len(self._order.rest(sample))
            self._moved.set()
        if not self._thread.is_alive() and not self._stop.is_set():
            self._thread.start()

    def wanted(self, sample: int) -> list[Shard]:
        """Shards in the order in which they are read from `sample` on, as many as fit into the folder."""
        found: dict[int, Shard] = {}
        used = 0
        while len(found) < len(self._shards):
            indices = self._order.rest(sample)
            numbers = np.searchsorted(self._starts, indices, side="right") - 1
            for number in numbers[np.sort(np.unique(numbers, return_index=True)[1])]:
                shard = self._shards[number]
                if number not in found:
                    used += shard.bytes
                    if used > self._remote.limit:
                        return list(found.values())
                    found[number] = shard
            sample += len(indices)
        return list(found.values())

    def close(self) -> None:
        """End the thread; what it was fetching is dropped."""
        self._stop.set()
        self._moved.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._moved.clear()
            if self._stop.is_set():  # looked at after clearing: `close` sets this one first
                return
            failed = not self._pass()
            self._moved.wait(AGAIN_AFTER if failed else None)

    def _pass(self) -> bool:
        """Fetch what is wanted from where training is, until it moves on; False where that failed."""
        try:
            for shard in self.wanted(self._sample):
                if self._moved.is_set() or self._stop.is_set():
                    break
                self._remote.prefetch(shard, self._stop)
        except (MachineError, OSError):  # not hidden: the reader that comes to need the shard fails on it by itself
            return False
        return True


def refuse_small(remote: RemoteShards, shards: Sequence[Shard], order: Order) -> None:
    """Raise UserError where the shards of a window may not fit: each would be fetched again for every batch."""
    starts = np.cumsum([0, *(shard.count for shard in shards)])
    first = np.arange(0, order.count, order.block)
    last = np.minimum(first + order.block, order.count) - 1
    spanned = np.searchsorted(starts, last, side="right") - np.searchsorted(starts, first, side="right") + 1
    touched = min(len(shards), int(np.sort(spanned)[-order.window :].sum()))
    need = sum(sorted((shard.bytes for shard in shards), reverse=True)[:touched])
    if need > remote.limit:
        gib = math.ceil(need / 2**30 * 100) / 100
        raise UserError(
            f"data.download_gib={remote.limit / 2**30:.3g}: a window of {order.window} blocks may read {touched} of "
            f"{len(shards)} shards in turns, {gib:g} GiB: use data.download_gib={gib:g}, or a smaller data.window"
        )
