"""Fetch remote shards before training reads them."""

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
"""Seconds between a failed fetch and the next attempt."""


class Prefetcher:
    """A thread that fetches the next shards of the order into the folder of `remote`, as many as fit there.

    If several processes share the folder, each has such a thread, and each file is fetched by one of them. The thread
    retries a failed fetch without raising an error. A reader that needs the shard fetches it itself and raises.
    """

    def __init__(self, remote: RemoteShards, shards: Sequence[Shard], order: Order) -> None:
        """Create the thread. Raises UserError if the folder's limit is too small for one window of the order."""
        self._remote, self._shards, self._order = remote, shards, order
        self._starts = np.cumsum([0, *(shard.count for shard in shards)])
        refuse_small(remote, shards, order)
        self._sample, self._until = 0, 0
        self._stop, self._moved = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def at(self, sample: int) -> None:
        """Tell the thread that training now reads global sample number `sample`. The first call starts the thread."""
        if not self._sample <= sample < self._until:  # training has entered another window
            self._sample, self._until = sample, sample + len(self._order.rest(sample))
            self._moved.set()
        if not self._thread.is_alive() and not self._stop.is_set():
            self._thread.start()

    def wanted(self, sample: int) -> list[Shard]:
        """Return the next shards in the order in which they are read from `sample` on, as many as fit in the folder."""
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
        """Stop the thread and drop the file that it is fetching."""
        self._stop.set()
        self._moved.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._moved.clear()
            # `close` sets _stop before _moved. Checking _stop after clearing _moved therefore never misses a close.
            if self._stop.is_set():
                return
            failed = not self._pass()
            self._moved.wait(AGAIN_AFTER if failed else None)

    def _pass(self) -> bool:
        """Fetch the shards that training needs next, until it enters another window. Return False if a fetch failed."""
        try:
            for shard in self.wanted(self._sample):
                if self._moved.is_set() or self._stop.is_set():
                    break
                self._remote.prefetch(shard, self._stop)
        except (MachineError, OSError):  # this hides no error: a reader that needs the shard raises it again
            return False
        return True


def refuse_small(remote: RemoteShards, shards: Sequence[Shard], order: Order) -> None:
    """Raise UserError if the shards of one window may exceed the folder's limit.

    Each shard would then be fetched again for every batch.
    """
    starts = np.cumsum([0, *(shard.count for shard in shards)])
    first = np.arange(0, order.count, order.block)
    last = np.minimum(first + order.block, order.count) - 1
    # Number of shards that each block spans. The `window` largest numbers bound the shards of any window.
    spanned = np.searchsorted(starts, last, side="right") - np.searchsorted(starts, first, side="right") + 1
    touched = min(len(shards), int(np.sort(spanned)[-order.window :].sum()))
    need = sum(sorted((shard.bytes for shard in shards), reverse=True)[:touched])
    if need > remote.limit:
        gib = math.ceil(need / 2**30 * 100) / 100
        raise UserError(
            f"data.download_gib={remote.limit / 2**30:.3g}: a window of {order.window} blocks may read {touched} of "
            f"{len(shards)} shards, {gib:g} GiB in total: use data.download_gib={gib:g}, or a smaller data.window"
        )
