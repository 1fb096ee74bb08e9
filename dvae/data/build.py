"""Building shards: every image of a source, rendered, split, and written as WebDataset tar files."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import tarfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from omegaconf import OmegaConf
from webdataset import ShardWriter

from dvae import files
from dvae.data.images import DamagedImage, encode_png
from dvae.data.manifest import FILE, HELDOUT, TRAIN, Manifest, Shard
from dvae.errors import MachineError, UserError, one_line
from dvae.registry import SOURCES, Shapes
from dvae.registry.sources import Source

Progress = Callable[[int, int], None]
"""progress(done, total), in images."""
FEW = 256  # images; processes take seconds to start, longer than these take to render
NAMED = 20  # damaged images that are named; the others are only counted


@dataclass(frozen=True)
class Rendered:
    """Image number `index` of the source as it goes into a shard, or the reason why it cannot."""

    index: int
    key: str = ""
    png: bytes = b""
    labels: dict[str, str | int] = field(default_factory=dict)
    position: float = 0.0
    damage: str = ""


def build(
    source_node: Any,
    size: int,
    out: str | Path,
    heldout_fraction: float = 0.1,
    channels: int = 3,
    shard_size: int = 10_000,
    workers: int = 2,
    progress: Progress | None = None,
    max_bad_fraction: float = 0.01,
) -> Manifest:
    """Write the shards of a source into the folder `out`, which appears complete or not at all.

    An image is held out by a keyed hash of its pixels, so the splits are disjoint by construction: identical images
    (duplicates in the source) always land on the same side. The share held out is `heldout_fraction` up to chance.
    The shards' bytes do not depend on `workers`. Where `out` holds the same request already, it is left as it is.
    Raises UserError for a request that cannot work, or more than `max_bad_fraction` damaged images.
    """
    out = Path(out)
    _check(size, channels, heldout_fraction, shard_size, workers, max_bad_fraction)
    config = SOURCES.config(source_node)
    node = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    request = {
        "image_size": size,
        "channels": channels,
        "source": node,
        "heldout_fraction": heldout_fraction,
        "shard_size": shard_size,
    }
    if (existing := _existing(out, request)) is not None:
        return existing
    source = SOURCES.build(node, Shapes(image_size=size, channels=channels))
    try:
        _remove_leftovers(out)
        with ExitStack() as held, files.new_folder(out) as aside:
            held.enter_context(_locked(aside))  # let go of only after new_folder has published the shards
            written = _write(source, aside, heldout_fraction, shard_size, workers, progress, max_bad_fraction)
            manifest = Manifest(**request, licence=source.licence, protocol=source.protocol, **written)  # type: ignore[arg-type]
            files.write_json(aside / FILE, manifest.as_dict())
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"shards cannot be written to {out} ({error.strerror}): choose another folder") from None
    except BrokenProcessPool as error:
        raise MachineError(
            f"a process that renders images died ({one_line(error)}); nothing was left at {out}"
        ) from None
    except OSError as error:
        raise MachineError(f"writing shards to {out} failed: {one_line(error)}; nothing was left there") from None
    return manifest


def _check(size: int, channels: int, heldout: float, shard_size: int, workers: int, max_bad: float) -> None:
    if size < 1:
        raise UserError(f"size={size}: use 1 or more pixels")
    if channels not in (1, 3):
        raise UserError(f"channels={channels}: images have 1 or 3 channels")
    for name, fraction in (("heldout", heldout), ("max_bad_fraction", max_bad)):
        if not 0 <= fraction < 1:
            raise UserError(f"{name}={fraction}: use a fraction of at least 0 and below 1")
    if shard_size < 1:
        raise UserError(f"shard_size={shard_size}: use 1 or more")
    if workers < 1:
        raise UserError(f"workers={workers}: use 1 or more")


def _existing(out: Path, request: dict[str, Any]) -> Manifest | None:
    """The manifest at `out` if it is of this request; None where nothing is there. Raises UserError otherwise."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / FILE).exists():
        raise UserError(f"{out} exists and holds no shards: choose another folder or remove it")
    manifest = Manifest.load(out)
    there = manifest.request()
    for key, wanted in request.items():
        if there[key] != wanted:
            raise UserError(
                f"{out} holds shards of another request ({_difference(key, there[key], wanted)}): "
                "choose another folder or remove it"
            )
    return manifest


def _difference(key: str, there: Any, wanted: Any) -> str:
    """What differs, with a source's single field where only that differs."""
    if isinstance(there, dict) and isinstance(wanted, dict):
        key, there, wanted = next(
            (f"{key}.{k}", there.get(k), wanted.get(k)) for k in {**there, **wanted} if there.get(k) != wanted.get(k)
        )
    return f"{key} {there}, not {wanted}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system lets go of when this process dies. Raises BlockingIOError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _remove_leftovers(out: Path) -> None:
    """Remove what killed builds of `out` left beside it. Raises UserError where another one is at work."""
    for leftover in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        try:
            with _locked(leftover):
                shutil.rmtree(leftover)
        except BlockingIOError:
            raise UserError(f"another process is building {out} now: wait for it or choose another folder") from None


def _write(
    source: Source,
    folder: Path,
    heldout_fraction: float,
    shard_size: int,
    workers: int,
    progress: Progress | None,
    max_bad_fraction: float,
) -> dict[str, Any]:
    """Write all images into `folder`; returns the manifest's splits, labels and damages."""
    total = len(source)
    writers = {split: SplitWriter(folder, split, shard_size) for split in (TRAIN, HELDOUT)}
    values: dict[str, set[str | int]] = {}
    damages: list[str] = []
    try:
        for image in _rendered(source, workers):
            if image.damage:
                damages.append(image.damage)
                if len(damages) > max_bad_fraction * total:
                    raise UserError(
                        f"more than {max_bad_fraction:.3g} of {total} images are damaged ({'; '.join(damages[:3])}): "
                        "mend or remove them, or raise max_bad_fraction"
                    )
            else:
                writers[HELDOUT if image.position < heldout_fraction else TRAIN].write(image)
                for name, value in image.labels.items():
                    values.setdefault(name, set()).add(value)
            if progress:
                progress(image.index + 1, total)
    finally:  # after an error too: an open tar would complain when it is collected
        splits = {split: writer.close() for split, writer in writers.items()}
    if not splits[TRAIN]:
        raise UserError(f"none of {total} images is left for training with heldout={heldout_fraction}: hold fewer out")
    labels = {name: sorted(seen, key=lambda v: (isinstance(v, str), v)) for name, seen in sorted(values.items())}
    return {"splits": splits, "labels": labels, "damaged": len(damages), "damaged_first": damages[:NAMED]}


class SplitWriter:
    """Writes one split's images as shards of at most `shard_size`; a split without images has no shard."""

    def __init__(self, folder: Path, split: str, shard_size: int) -> None:
        self._folder, self._split, self._shard_size = folder, split, shard_size
        self._writer: ShardWriter | None = None
        self._stream: IO[bytes] | None = None
        self._shards: list[Shard] = []

    def write(self, image: Rendered) -> None:
        if self._writer is None:
            # opener and post, not a path: so that each file is fsynced, and a % in the folder's name does no harm
            self._writer = ShardWriter(
                f"{self._split}-%06d.tar",
                maxcount=self._shard_size,
                maxsize=math.inf,
                opener=self._open,
                post=self._seal,
                verbose=0,
                encoder=False,
                mtime=0,
            )
        about = json.dumps({"key": image.key, "labels": image.labels}, sort_keys=True)
        # WebDataset cuts a name at its first dot, so a file name cannot be the key
        self._writer.write({"__key__": f"{image.index:09d}", "png": image.png, "json": about.encode()})

    def close(self) -> list[Shard]:
        if self._writer is not None:
            self._writer.close()
        return self._shards

    def _open(self, name: str) -> IO[bytes]:
        self._stream = (self._folder / name).open("wb")
        return self._stream

    def _seal(self, name: str) -> None:
        """Close a finished shard and write its index."""
        assert self._stream is not None
        self._stream.close()
        path = self._folder / name
        index = path.with_suffix(".npy")
        rows = index_of(path)
        with index.open("wb") as file:
            np.save(file, rows)
        self._shards.append(
            Shard(name, len(rows), path.stat().st_size, files.sha256(path), index.name, files.sha256(index))
        )


def index_of(path: Path) -> np.ndarray:
    """Offset and size of each sample's PNG and JSON in a shard, (count, 4), int64, in the order of the PNGs."""
    with tarfile.open(path, "r:") as tar:
        members = {member.name: (member.offset_data, member.size) for member in tar}
    keys = [name.removesuffix(".png") for name in members if name.endswith(".png")]
    rows = [(*members[f"{key}.png"], *members[f"{key}.json"]) for key in keys]
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


def _position(pixels: np.ndarray) -> float:
    """A number in [0, 1) that depends on the pixels alone; held out where it is below the fraction."""
    digest = hashlib.blake2b(pixels.tobytes(), key=b"dvae held-out split", digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _render(source: Source, index: int) -> Rendered:
    try:
        item = source[index]
    except DamagedImage as error:
        return Rendered(index, damage=one_line(error))
    return Rendered(index, item.key, encode_png(item.image), item.labels, _position(item.image))


def _rendered(source: Source, workers: int) -> Iterator[Rendered]:
    """Every image in the source's order, rendered by `workers` processes (1, or few images: this one)."""
    if workers == 1 or len(source) < FEW:
        yield from (_render(source, index) for index in range(len(source)))
        return
    chunk = max(1, min(64, len(source) // (4 * workers)))
    starts = iter(range(0, len(source), chunk))
    # forkserver: this process may hold threads (torch), which a fork would break
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dvae.data.build"])
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(source,)) as pool:
        pending: deque[Future[list[Rendered]]] = deque()
        try:
            for _ in range(3 * workers):  # enough ahead to keep all busy, few enough to bound the memory
                _submit(pool, pending, starts, chunk, len(source))
            while pending:
                images = pending.popleft().result()
                _submit(pool, pending, starts, chunk, len(source))
                yield from images
        finally:
            for future in pending:
                future.cancel()


def _submit(
    pool: ProcessPoolExecutor, pending: deque[Future[list[Rendered]]], starts: Iterator[int], chunk: int, total: int
) -> None:
    start = next(starts, None)
    if start is not None:
        pending.append(pool.submit(_render_chunk, start, min(start + chunk, total)))


_source: Source  # of this worker process


def _start_worker(source: Source) -> None:
    global _source
    _source = source
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """End with the parent: a worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _render_chunk(start: int, stop: int) -> list[Rendered]:
    return [_render(_source, index) for index in range(start, stop)]
