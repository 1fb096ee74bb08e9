"""Many images of a trained run in one file or folder: resumable, by several processes, always the same bytes.

Chunks of images are drawn into a hidden folder beside the result, each complete or absent, and put together at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from dvae.errors import UserError
from dvae.inference import batching
from dvae.inference.generation import formats, workers
from dvae.inference.generation.chunks import Chunks, difference, read_finished
from dvae.inference.generation.generation_settings import DrawingConfig
from dvae.inference.generation.sample_task import Samples
from dvae.inference.generation.task import GenerationTask
from dvae.tracking.console import Progress, say
from dvae.utils import atomic_files


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What became of a request."""

    n: int
    """Results that were asked for."""
    nfe: float
    """Network evaluations per image, as counted; their mean where images differ."""
    drawn: int
    """Results that this command drew; the others were there."""
    images_per_second: float
    """Refined images of those, without the time to load the run."""

    def __str__(self) -> str:
        speed = f", {self.drawn} drawn now at {self.images_per_second:.3g} images/s" if self.drawn else ""
        return f"{self.nfe:g} network evaluations each{speed}"


def draw(settings: DrawingConfig, make: type[GenerationTask] = Samples) -> Finished:
    """Draw the results first..first + n - 1 of make(settings) into `settings.out`; go on where an earlier attempt was
    ended.

    Raises UserError for what cannot be drawn, or where `out` is there already or half-drawn by another request;
    MachineError where a process ends early. What is drawn by then is kept.
    """
    _check(settings)
    out, form = formats.of(settings.out)
    artist = make(settings, "cpu" if settings.processes > 1 else None)
    n = len(artist.asked)
    if not form.whole:
        _check_grid(settings.out, n, artist.tiles)
    request = artist.request()
    record = out.with_name(f"{out.name}.json")
    if form.whole and (nfe := _finished(out, record, request, n)) is not None:
        Chunks.remove_at(out)
        say(f"{settings.out} is there already, as asked for")
        return Finished(n=n, nfe=nfe, drawn=0, images_per_second=0.0)
    with Chunks.opened(out, request) as chunks:
        wanted = batching.calls(settings.first, n, artist.batch, artist.together)
        missing = [numbers for numbers in wanted if not chunks.has(numbers)]
        count = sum(len(_both(numbers, artist.asked)) for numbers in missing)
        seconds = _draw(artist, chunks, missing, n - count)
        evaluations = sum(int(row["nfe"].sum()) for _, row in _kept(artist, chunks, wanted, "nfe"))
        mean = batching.mean(evaluations, n * artist.images)
        if form.whole:  # before the result, which would be refused as somebody else's without it
            versions = {name: metadata.version(name) for name in ("dvae", "torch", "numpy")}
            atomic_files.write_json(record, {"request": request, "n": n, "nfe": mean, "versions": versions})
        form.write(out, _results(artist, chunks, wanted), n, artist.tiles)
        chunks.remove()
    speed = count * artist.images / seconds if count else 0.0
    return Finished(n=n, nfe=mean, drawn=count, images_per_second=speed)


def _draw(artist: GenerationTask, chunks: Chunks, missing: list[range], done: int) -> float:
    """Draw the missing chunks; seconds from the moment that the first process had loaded the run."""
    settings = artist.settings
    began = time.perf_counter()
    with Progress("images", len(artist.asked), done) as progress:

        def after(numbers: range | None) -> None:
            nonlocal began
            if numbers is not None:
                count = len(_both(numbers, artist.asked))
                progress.update(progress.step + count, count * artist.images)
            elif progress.step == progress.start:  # a process is ready: what it took to start would spoil the rate
                progress.begin()
                began = time.perf_counter()

        if settings.processes > 1 and missing:
            workers.draw(type(artist), settings, chunks.folder, missing, after)
        else:
            generate_chunks(artist, chunks, missing, after)
    return time.perf_counter() - began


def generate_chunks(artist: GenerationTask, chunks: Chunks, share: list[range], after: Callable[[range], None]) -> None:
    """Draw and keep chunk by chunk."""
    for numbers in share:
        chunks.write(numbers, artist.draw(numbers))
        after(numbers)


def _kept(
    artist: GenerationTask, chunks: Chunks, wanted: list[range], *names: str
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(number, its row of each of the named arrays) of all that is asked for."""
    for numbers in wanted:
        both = _both(numbers, artist.asked)
        arrays = {name: chunks.read(numbers, name, both.stop - numbers.start) for name in names}
        if wrong := next((name for name in names if not _is_sound(artist, name, arrays[name])), ""):
            raise chunks.damage(numbers, f"{wrong} is {arrays[wrong].dtype} {arrays[wrong].shape}")
        for number in both:
            yield number, {name: array[number - numbers.start] for name, array in arrays.items()}


def _is_sound(artist: GenerationTask, name: str, array: np.ndarray) -> bool:
    """Whether an array can be what `artist.draw` gave by that name."""
    config = artist.pipeline.config
    if name == "pixels":
        tile = (artist.tiles[0] * config.image_size, artist.tiles[1] * config.image_size, config.channels)
        return array.dtype == np.uint8 and array.shape[1:] == tile
    if name == "label":
        return array.dtype.kind == "i" and array.ndim == 1 and bool((array < len(config.classes)).all())
    return array.dtype.kind in "iu"


def _results(artist: GenerationTask, chunks: Chunks, wanted: list[range]) -> formats.Results:
    """What is written of each number."""
    for number, row in _kept(artist, chunks, wanted, "pixels", *(["label"] if artist.labeled else [])):
        yield formats.Result(number, row["pixels"], artist.about(number, row["label"]) if "label" in row else None)


def _both(numbers: range, asked: range) -> range:
    """Those of the numbers that are asked for: a fixed chunk may hold others."""
    return range(max(numbers.start, asked.start), min(numbers.stop, asked.stop))


def _check(settings: DrawingConfig) -> None:
    for name, least in (("n", 1), ("first", 0), ("processes", 1)):
        if (value := getattr(settings, name)) is not None and value < least:
            raise UserError(f"{name}={value}: use {least} or more")
    if settings.batch is not None and settings.batch < 1:
        raise UserError(f"batch={settings.batch}: use 1 or more, or leave it out for fixed chunks")


def _check_grid(out: str, n: int, tiles: formats.Tiles) -> None:
    most = formats.MOST_IN_A_GRID * 2 // max(2, tiles[0] * tiles[1])
    if n > most:
        raise UserError(
            f"out={out} is one picture, too small for n={n} (at most {most}): "
            "name a folder (out=NAME/), .npy, .zip or .tar"
        )


def _finished(out: Path, record: Path, request: dict[str, object], n: int) -> float | None:
    """Evaluations per image of what is there as asked for; None where nothing is. Raises UserError for anything else.

    A picture is replaced; what may hold 50,000 images is not.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    theirs = read_finished(record) if record.is_file() else None
    if theirs is None:
        raise UserError(f"out={out} is there already, and not from this command: name another, or remove it")
    if unlike := difference(theirs.request | {"n": theirs.n}, request | {"n": n}):
        raise UserError(f"out={out} is there already, drawn with {unlike}: name another, or remove it")
    return theirs.nfe
