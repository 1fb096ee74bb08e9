"""Render the images of a source in order, in several processes, as they are written to shards."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from dvae.data.images import DamagedImage, encode_png
from dvae.errors import fold
from dvae.registry.sources.base import Source
from dvae.utils.child_processes import begin_child

MIN_PARALLEL = 256
"""Minimum number of images for which worker processes are started.

Starting the processes takes seconds, longer than rendering fewer images takes.
"""


@dataclass(frozen=True)
class RenderedImage:
    """Image number `index` of the source as it is written to a shard, or the reason why it cannot be."""

    index: int
    key: str = ""
    png: bytes = b""
    labels: dict[str, str | int] = field(default_factory=dict)
    position: float = 0.0
    """Hash of the pixels, in [0, 1). The image is held out if this is below the held-out fraction."""
    damage: str = ""
    """Why the image cannot be read; empty if it can."""

    def metadata(self) -> bytes:
        """Return the JSON that is stored with the image in a shard."""
        return json.dumps({"key": self.key, "labels": self.labels}, sort_keys=True).encode()

    def digest(self) -> str:
        """Return a SHA-256 of the image, its metadata and its damage."""
        return hashlib.sha256(b"\0".join([self.damage.encode(), self.metadata(), self.png])).hexdigest()


def render(source: Source, index: int) -> RenderedImage:
    """Render image number `index` of the source."""
    try:
        item = source[index]
    except DamagedImage as error:
        return RenderedImage(index, damage=fold(error))
    return RenderedImage(index, item.key, encode_png(item.image), item.labels, _position(item.image))


def render_all(source: Source, wanted: Sequence[range], workers: int) -> Generator[RenderedImage]:
    """Render the images `wanted`, in that order, in `workers` processes.

    With one worker, or fewer than MIN_PARALLEL images, this process renders them itself.
    """
    total = sum(len(indices) for indices in wanted)
    if workers == 1 or total < MIN_PARALLEL:
        yield from (render(source, index) for indices in wanted for index in indices)
        return
    size = max(1, min(64, total // (4 * workers)))
    chunks = (indices[start : start + size] for indices in wanted for start in range(0, len(indices), size))
    # Use forkserver because this process may have threads (torch), and forking such a process is not safe.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dvae.data.building.render"])
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(source,)) as pool:
        pending: deque[Future[list[RenderedImage]]] = deque()
        try:
            for _ in range(3 * workers):  # enough pending chunks to keep all workers busy, few enough to bound memory
                _submit(pool, pending, chunks)
            while pending:
                images = pending.popleft().result()
                _submit(pool, pending, chunks)
                yield from images
        finally:
            for future in pending:
                future.cancel()


def _position(pixels: np.ndarray) -> float:
    digest = hashlib.blake2b(pixels.tobytes(), key=b"dvae held-out split", digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _submit(pool: ProcessPoolExecutor, pending: deque[Future[list[RenderedImage]]], chunks: Iterator[range]) -> None:
    chunk = next(chunks, None)
    if chunk is not None:
        pending.append(pool.submit(_render_chunk, chunk))


_source: Source  # the source of this worker process, set by `_start_worker`


def _start_worker(source: Source) -> None:
    global _source
    _source = source
    begin_child()


def _render_chunk(chunk: range) -> list[RenderedImage]:
    return [render(_source, index) for index in chunk]
