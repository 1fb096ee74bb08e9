"""Features of a set of images: by several processes, always the same bits; those of real images are kept."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path

import torch
from safetensors.torch import save_file

from dvae.errors import MachineError, UserError, fold
from dvae.evaluation import metrics
from dvae.evaluation.image_sets import ImageSet
from dvae.evaluation.metrics import Extractor, Features
from dvae.tracking.console import say
from dvae.utils import atomic_files
from dvae.utils.machine import end_with_parent
from dvae.utils.read import DamagedFile, read_weights_header
from dvae.utils.weights import load_weights

Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Way:
    """How features are computed: what may move their last bits, and how many processes share the work."""

    extractor: Extractor
    batch: int
    """Images per pass, from the first on, so that the same ones go together whoever computes them."""
    processes: int
    threads: int
    """Of each process, since their number decides the rounding of sums."""

    @classmethod
    def of(cls, extractor: Extractor, batch: int, processes: int) -> Way:
        """One thread a process. Inception takes as many as PyTorch has here, as torch-fidelity's own command does; with
        several processes they would only be in each other's way, so that a line says what to do."""
        threads = torch.get_num_threads() if extractor.has_logits else 1
        if processes > 1 and threads > 1:
            say(f"{processes} processes of {threads} threads each: OMP_NUM_THREADS=1 before the command is faster")
        return cls(extractor=extractor, batch=batch, processes=processes, threads=threads)

    def key(self) -> str:
        one = self.extractor
        return f"{one.name} {one.weights_sha256} {one.resize} batch {self.batch} threads {self.threads}"


def of_set(images: ImageSet, way: Way, advance: Advance) -> Features:
    """Features of all images of a set, in its order. `advance(count)` is told of each batch.

    Raises MachineError where a process ends early.
    """
    starts = range(0, len(images), way.batch)
    batches = [(start, min(start + way.batch, len(images))) for start in starts]
    done = []
    for (start, stop), part in zip(batches, _parts(images, way, batches), strict=True):
        done.append(part)
        advance(stop - start)
    return Features.join(done)


def _parts(images: ImageSet, way: Way, batches: list[tuple[int, int]]) -> Iterator[Features]:
    count = min(way.processes, len(batches))
    if count <= 1:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        before = torch.get_num_threads()
        torch.set_num_threads(way.threads)
        try:
            for start, stop in batches:
                yield metrics.extract(way.extractor, images.read(start, stop).to(device))
        finally:
            torch.set_num_threads(before)
        return
    context = multiprocessing.get_context("spawn")
    numbers: Queue[int] = context.Queue()
    for number in range(count):
        numbers.put(number)
    with ProcessPoolExecutor(count, context, _begin, (images, way, numbers)) as pool:
        try:
            yield from pool.map(_batch, batches)
        except BrokenProcessPool:
            raise MachineError(
                "a process that computed features ended early: the same command again begins anew"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_work: tuple[ImageSet, Way, str]
"""What a process of the pool computes with."""


def _begin(images: ImageSet, way: Way, numbers: Queue[int]) -> None:
    global _work
    os.setpgrp()  # Ctrl-C reaches the command alone, which ends all
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(way.threads)
    gpus = torch.cuda.device_count()
    _work = (images, way, f"cuda:{numbers.get() % gpus}" if gpus else "cpu")


def _batch(numbers: tuple[int, int]) -> Features:
    images, way, device = _work
    return metrics.extract(way.extractor, images.read(*numbers).to(device))


def kept(images: ImageSet, sha256: str, way: Way, cache: Path, advance: Advance) -> Features:
    """The same, kept in the folder `cache` by the hash of the images and the way. Raises MachineError for damage."""
    return cached(f"{sha256} {way.key()}", cache, lambda: of_set(images, way, advance), advance)


def cached(what: str, cache: Path, make: Callable[[], Features], advance: Advance) -> Features:
    """What `make` gives, kept in the folder `cache` by `what` it is of; `advance` is told of those that were there.

    Raises MachineError for a damaged file.
    """
    path = cache / f"features-{hashlib.sha256(what.encode()).hexdigest()[:32]}.safetensors"
    if path.exists():
        features = _read(path)
        advance(len(features))
        return features
    features = make()
    tensors = {"pooled": features.pooled} | ({} if features.logits is None else {"logits": features.logits})
    atomic_files.write_file(path, lambda aside: save_file(tensors, aside))
    return features


def _read(path: Path) -> Features:
    """Kept features. Raises MachineError for a damaged file, before memory is taken for what its header claims."""
    try:
        header = read_weights_header(path)
        for name, tensor in header.items():
            if name not in ("pooled", "logits") or tensor.dtype != "F32" or len(tensor.shape) != 2:
                raise DamagedFile(path, f"{name[:80]!r} is no table of numbers")
        if "pooled" not in header or len({tensor.shape[0] for tensor in header.values()}) != 1:
            raise DamagedFile(path, "does not hold the features of one set of images")
        found = load_weights(path)
    except (DamagedFile, UserError, OSError) as error:
        reason = fold(error).removeprefix(f"{path}: ")
        raise MachineError(f"{path}: damaged ({reason}); delete it, it will be made again") from None
    return Features(found["pooled"], found.get("logits"))
