"""Generate many images of a trained run into one file or folder.

A request can be resumed and can use several processes; the bytes of the result are always the same. Chunks of images
are stored in a hidden folder beside the result. Each chunk is complete or absent. At the end the chunks are combined.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dvae.errors import UserError
from dvae.inference.batching import chunk_ranges, mean_nfe
from dvae.inference.generation import formats
from dvae.inference.generation.chunks import ChunkStore, first_difference, package_versions, read_generation_record
from dvae.inference.generation.generation_settings import GenerationConfig
from dvae.inference.generation.sample_task import SampleTask
from dvae.inference.generation.task import GenerationTask
from dvae.inference.generation.worker_pool import generate_in_processes
from dvae.tracking.console import Progress, say
from dvae.utils import atomic_files


@dataclass(frozen=True, kw_only=True)
class GenerationSummary:
    """Summary of a finished request."""

    n: int
    """Number of requested results."""
    nfe: float
    """Counted network evaluations per image, averaged over images."""
    generated: int
    """Number of results that this command generated. The others existed before."""
    images_per_second: float
    """Refined images per second that this command generated. The time to load the run is not counted."""

    def __str__(self) -> str:
        speed = f", {self.generated} drawn now at {self.images_per_second:.3g} images/s" if self.generated else ""
        return f"{self.nfe:g} network evaluations each{speed}"


def generate_to_file(settings: GenerationConfig, task_class: type[GenerationTask] = SampleTask) -> GenerationSummary:
    """Generate the results first, ..., first + n - 1 of `task_class(settings)` into `settings.out`.

    If an earlier attempt was stopped, its finished chunks are reused.

    Raises:
        UserError: the settings are invalid, or `out` exists or is unfinished from another request.
        MachineError: a worker process ended early. The finished chunks are kept.
    """
    _check(settings)
    out, form = formats.output_format(settings.out)
    task = task_class(settings, "cpu" if settings.processes > 1 else None)
    n = len(task.requested)
    if form.replaceable:
        _check_grid(settings.out, n, task.tiles)
    request = task.request()
    record = out.with_name(f"{out.name}.json")
    if not form.replaceable and (nfe := _existing_nfe(out, record, request, n)) is not None:
        ChunkStore.remove_at(out)
        say(f"{settings.out} exists already and matches this request")
        return GenerationSummary(n=n, nfe=nfe, generated=0, images_per_second=0.0)
    with ChunkStore.opened(out, request) as chunks:
        ranges = chunk_ranges(settings.first, n, task.results_per_call, task.results_per_chunk)
        missing = chunks.missing(ranges)
        count = sum(len(_intersection(numbers, task.requested)) for numbers in missing)
        seconds = _generate_missing(task, chunks, missing, n - count)
        evaluations = sum(int(row["nfe"].sum()) for _, row in _stored_rows(task, chunks, ranges, "nfe"))
        nfe = mean_nfe(evaluations, n * task.images_per_result)
        # write the record before the result: a result without a record is refused by the next command
        if not form.replaceable:
            content = {"request": request, "n": n, "nfe": nfe, "versions": package_versions()}
            atomic_files.write_json(record, content)
        form.write(out, _output_items(task, chunks, ranges), n, task.tiles)
        chunks.remove()
    speed = count * task.images_per_result / seconds if count else 0.0
    return GenerationSummary(n=n, nfe=nfe, generated=count, images_per_second=speed)


def _generate_missing(task: GenerationTask, chunks: ChunkStore, missing: list[range], done: int) -> float:
    """Generate the missing chunks. Returns the seconds since the first process loaded the run."""
    settings = task.settings
    began = time.perf_counter()
    with Progress("images", len(task.requested), done) as progress:

        def on_chunk(numbers: range | None) -> None:
            nonlocal began
            if numbers is not None:
                count = len(_intersection(numbers, task.requested))
                progress.update(progress.step + count, count * task.images_per_result)
            elif progress.step == progress.start:  # the first process is ready: do not count its start in the rate
                progress.begin()
                began = time.perf_counter()

        if settings.processes > 1 and missing:
            generate_in_processes(type(task), settings, chunks.folder, missing, on_chunk)
        else:
            chunks.fill(missing, task.generate, on_chunk)
    return time.perf_counter() - began


def _stored_rows(
    task: GenerationTask, chunks: ChunkStore, ranges: list[range], *names: str
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Iterate over the requested results: yield (number, row of each named array).

    Raises MachineError if a stored chunk is damaged.
    """
    for numbers in ranges:
        requested = _intersection(numbers, task.requested)
        arrays = {name: chunks.read(numbers, name, requested.stop - numbers.start) for name in names}
        if wrong := next((name for name in names if not _is_valid(task, name, arrays[name])), ""):
            raise chunks.damage(numbers, f"{wrong} is {arrays[wrong].dtype} {arrays[wrong].shape}")
        for number in requested:
            yield number, {name: array[number - numbers.start] for name, array in arrays.items()}


def _is_valid(task: GenerationTask, name: str, array: np.ndarray) -> bool:
    """Whether an array has the type and shape that `task.generate` returns under that name."""
    config = task.pipeline.config
    if name == "pixels":
        tile = (task.tiles[0] * config.image_size, task.tiles[1] * config.image_size, config.channels)
        return array.dtype == np.uint8 and array.shape[1:] == tile
    if name == "label":
        return array.dtype.kind == "i" and array.ndim == 1 and bool((array < len(config.classes)).all())
    return array.dtype.kind in "iu"


def _output_items(task: GenerationTask, chunks: ChunkStore, ranges: list[range]) -> formats.OutputItems:
    """Iterate over the output of the requested results, in the order of their numbers."""
    for number, row in _stored_rows(task, chunks, ranges, "pixels", *(["label"] if task.labeled else [])):
        yield formats.OutputItem(
            number, row["pixels"], task.label_json(number, row["label"]) if "label" in row else None
        )


def _intersection(numbers: range, requested: range) -> range:
    """Return the numbers of a chunk that are requested. A fixed chunk may hold more numbers."""
    return range(max(numbers.start, requested.start), min(numbers.stop, requested.stop))


def _check(settings: GenerationConfig) -> None:
    for name, least in (("n", 1), ("first", 0), ("processes", 1)):
        if (value := getattr(settings, name)) is not None and value < least:
            raise UserError(f"{name}={value}: use {least} or more")
    if settings.batch is not None and settings.batch < 1:
        raise UserError(f"batch={settings.batch}: use 1 or more, or leave it out for fixed chunks")


def _check_grid(out: str, n: int, tiles: formats.Tiles) -> None:
    most = formats.MAX_GRID_RESULTS * 2 // max(2, tiles[0] * tiles[1])
    if n > most:
        raise UserError(
            f"out={out} is one picture, too small for n={n} (at most {most}): "
            "name a folder (out=NAME/), .npy, .zip or .tar"
        )


def _existing_nfe(out: Path, record: Path, request: dict[str, object], n: int) -> float | None:
    """Return the network evaluations per image of an existing result of this request; None if there is no result.

    Raises UserError if `out` exists and belongs to another request or to no request. Pictures are not checked here,
    because they are replaced; a set of images, which may hold 50,000, is not replaced.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    existing = read_generation_record(record) if record.is_file() else None
    if existing is None:
        raise UserError(f"out={out} is there already, and not from this command: name another, or remove it")
    if unlike := first_difference(existing.request | {"n": existing.n}, request | {"n": n}):
        raise UserError(f"out={out} is there already, generated with {unlike}: name another, or remove it")
    return existing.nfe
