"""Features of a set of images: several processes give the same bits as one; those of real images are kept."""

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


@dataclass(frozen=True, kw_only=True)
class FeatureMethod:
    """How features are computed: what may move their last bits, and how many processes share the work."""

    extractor: Extractor
    batch: int
    """Images per pass, counted from the first image, so that every process computes the same batches."""
    processes: int = 1
    threads: int | None = None
    """Threads of each process, which decide the rounding of sums. None: as many as PyTorch has here."""
    device: str | None = None
    """None: a GPU if there is one."""

    @classmethod
    def for_extractor(cls, extractor: Extractor, batch: int, processes: int) -> FeatureMethod:
        """One thread for each process. Inception takes as many as PyTorch has here, as torch-fidelity's command does.

        With several processes these threads only slow each other down, so that a line says what to do.
        """
        threads = torch.get_num_threads() if extractor.has_logits else 1
        if processes > 1 and threads > 1:
            say(f"{processes} processes of {threads} threads each: OMP_NUM_THREADS=1 before the command is faster")
        return cls(extractor=extractor, batch=batch, processes=processes, threads=threads)

    def key(self) -> str:
        """What the features depend on, besides the images."""
        one = self.extractor
        how = "pooled" if self.threads is None else f"batch {self.batch} threads {self.threads}"
        return f"{one.name} {one.weights_sha256} {one.resize} {how}"


def compute_features(images: ImageSet, method: FeatureMethod, advance: Advance) -> Features:
    """Features of all images of a set, in its order. `advance(count)` is called after each batch.

    Raises MachineError if a process ends early.
    """
    starts = range(0, len(images), method.batch)
    batches = [(start, min(start + method.batch, len(images))) for start in starts]
    done = []
    for (start, stop), part in zip(batches, _parts(images, method, batches), strict=True):
        done.append(part)
        advance(stop - start)
    return Features.join(done)


def _parts(images: ImageSet, method: FeatureMethod, batches: list[tuple[int, int]]) -> Iterator[Features]:
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
            raise MachineError(
                "a process that computed features ended early: the same command again begins anew"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_state: tuple[ImageSet, FeatureMethod, str]
"""What a process of the pool computes with."""


def _start_process(images: ImageSet, method: FeatureMethod, numbers: Queue[int]) -> None:
    global _state
    begin_child()
    torch.set_num_threads(method.threads or torch.get_num_threads())
    gpus = torch.cuda.device_count()
    _state = (images, method, f"cuda:{numbers.get() % gpus}" if gpus else "cpu")


def _batch(numbers: tuple[int, int]) -> Features:
    images, method, device = _state
    return metrics.extract(method.extractor, images.read(*numbers).to(device))


def cached_features(images: ImageSet, sha256: str, method: FeatureMethod, cache: Path, advance: Advance) -> Features:
    """As `compute_features`, but kept in the folder `cache` by `sha256` of the images and the method.

    Raises MachineError for a damaged file.
    """
    return cached(f"{sha256} {method.key()}", cache, lambda: compute_features(images, method, advance), advance)


def cached(key: str, cache: Path, compute: Callable[[], Features], advance: Advance) -> Features:
    """The features of `key` in the folder `cache`, computed if they are not there; `advance` counts those read.

    Raises MachineError for a damaged file.
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
        raise damaged_cache_file(path, error) from None
    return Features(found["pooled"], found.get("logits"))
