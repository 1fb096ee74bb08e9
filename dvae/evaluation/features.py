"""Compute the features of a set of images, and cache the features of real images.

Several processes compute the same features as one, bit for bit.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path

import torch
from safetensors.torch import save_file

from dvae.errors import MachineError, UserError
from dvae.evaluation import metrics
from dvae.evaluation.image_sets import ImageSet
from dvae.evaluation.metrics import Extractor, Features
from dvae.evaluation.results import damaged_cache_file
from dvae.tracking.console import say
from dvae.utils import atomic_files
from dvae.utils.child_processes import begin_child
from dvae.utils.read import DamagedFile, read_weights_header
from dvae.utils.weights import load_weights

Advance = Callable[[int], None]
"""advance(count) moves a progress bar on by `count` images."""


@dataclass(frozen=True, kw_only=True)
class FeatureMethod:
    """How features are computed: the extractor, settings that affect rounding, and the number of processes."""

    extractor: Extractor
    """Network that computes the features."""
    batch: int
    """Images per forward pass. Batches are counted from the first image, so all processes use the same batches."""
    processes: int = 1
    """Number of processes that share the work."""
    threads: int | None = None
    """Threads of each process. They affect the rounding of sums. None: the number that PyTorch uses by default."""
    device: str | None = None
    """Device of a single process. None: a GPU if there is one, else the CPU."""

    @classmethod
    def for_extractor(cls, extractor: Extractor, batch: int, processes: int) -> FeatureMethod:
        """Choose the number of threads for an extractor.

        EfficientNet-Lite0 uses one thread for each process. Inception uses as many as PyTorch by default, as
        torch-fidelity's command does. With several processes these threads slow each other down, so this prints advice.
        """
        threads = torch.get_num_threads() if extractor.has_logits else 1
        if processes > 1 and threads > 1:
            say(f"{processes} processes with {threads} threads each are slow: put OMP_NUM_THREADS=1 before the command")
        return cls(extractor=extractor, batch=batch, processes=processes, threads=threads)

    def key(self) -> str:
        """A key for everything besides the images that the features depend on."""
        one = self.extractor
        how = "pooled" if self.threads is None else f"batch {self.batch} threads {self.threads}"
        return f"{one.name} {one.weights_sha256} {one.resize} {how}"


def compute_features(images: ImageSet, method: FeatureMethod, advance: Advance) -> Features:
    """Compute the features of all images of a set, in the set's order. `advance(count)` is called after each batch.

    Raises MachineError if a process ends before it is done.
    """
    starts = range(0, len(images), method.batch)
    batches = [(start, min(start + method.batch, len(images))) for start in starts]
    done = []
    for (start, stop), part in zip(batches, _parts(images, method, batches), strict=True):
        done.append(part)
        advance(stop - start)
    return Features.join(done)


def _parts(images: ImageSet, method: FeatureMethod, batches: list[tuple[int, int]]) -> Iterator[Features]:
    """Yield the features of each batch (start, stop), in order, computed in this process or in several others."""
    count = min(method.processes, len(batches))
    if count <= 1:
        device = method.device or ("cuda" if torch.cuda.is_available() else "cpu")
        before = torch.get_num_threads()
        torch.set_num_threads(method.threads or before)
        try:
            for start, stop in batches:
                yield metrics.extract(method.extractor, images.read(start, stop).to(device))
        finally:
            torch.set_num_threads(before)
        return
    context = multiprocessing.get_context("spawn")
    numbers: Queue[int] = context.Queue()
    for number in range(count):
        numbers.put(number)
    with ProcessPoolExecutor(count, context, _start_process, (images, method, numbers)) as pool:
        try:
            yield from pool.map(_batch, batches)
        except BrokenProcessPool:
            raise MachineError("a process that computed features ended early: run the same command again") from None
        finally:
            pool.shutdown(cancel_futures=True)


_state: tuple[ImageSet, FeatureMethod, str]
"""Images, method and device of a process of the pool. `_start_process` sets it."""


def _start_process(images: ImageSet, method: FeatureMethod, numbers: Queue[int]) -> None:
    """Initialize a process of the pool. It takes its number from the queue, and with it one of the GPUs."""
    global _state
    begin_child()
    torch.set_num_threads(method.threads or torch.get_num_threads())
    gpus = torch.cuda.device_count()
    _state = (images, method, f"cuda:{numbers.get() % gpus}" if gpus else "cpu")


def _batch(numbers: tuple[int, int]) -> Features:
    """Features of the images start to stop - 1, in a process of the pool."""
    images, method, device = _state
    return metrics.extract(method.extractor, images.read(*numbers).to(device))


def cached_features(images: ImageSet, sha256: str, method: FeatureMethod, cache: Path, advance: Advance) -> Features:
    """Compute features as `compute_features` does, or read them from the folder `cache`.

    The key of the cache is `sha256`, the hash of the images, and the method. Raises MachineError if a cached file is
    damaged.
    """
    return cached(f"{sha256} {method.key()}", cache, lambda: compute_features(images, method, advance), advance)


def cached(key: str, cache: Path, compute: Callable[[], Features], advance: Advance) -> Features:
    """Read the features with key `key` from the folder `cache`, or compute and store them.

    `advance` is called for features that are read; `compute` must advance by itself. Raises MachineError if the cached
    file is damaged.
    """
    path = cache / f"features-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    if path.exists():
        features = _read(path)
        advance(len(features))
        return features
    features = compute()
    tensors = {"pooled": features.pooled} | ({} if features.logits is None else {"logits": features.logits})
    atomic_files.write_file(path, lambda aside: save_file(tensors, aside))
    return features


def _read(path: Path) -> Features:
    """Read cached features. Raises MachineError if the file is damaged.

    The header is checked first, because a damaged one could claim any amount of memory.
    """
    try:
        header = read_weights_header(path)
        for name, tensor in header.items():
            if name not in ("pooled", "logits") or tensor.dtype != "F32" or len(tensor.shape) != 2:
                raise DamagedFile(path, f"{name[:80]!r} is not a float32 matrix")
        if "pooled" not in header or len({tensor.shape[0] for tensor in header.values()}) != 1:
            raise DamagedFile(path, "does not hold the features of one set of images")
        found = load_weights(path)
    except (DamagedFile, UserError, OSError) as error:
        raise damaged_cache_file(path, error) from None
    return Features(found["pooled"], found.get("logits"))
