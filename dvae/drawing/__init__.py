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

from dvae import files, pipeline
from dvae.drawing import formats, processes
from dvae.drawing.artist import Artist
from dvae.drawing.chunks import Chunks, difference, read
from dvae.errors import UserError
from dvae.settings import SampleConfig
from dvae.tracking.console import Progress, say


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What became of a request."""

    nfe: float
    """Network evaluations per image, as counted; their mean where images differ."""
    drawn: int
    """Images that this command drew; the others were there."""
    images_per_second: float
    """Of those, without the time to load the run."""


def draw(settings: SampleConfig) -> Finished:
    """Draw the images first..first + n - 1 of a seed into `settings.out`; go on where an earlier attempt was ended.

    Raises UserError for what cannot be drawn, or where `out` is there already or half-drawn by another request;
    MachineError where a process ends early. What is drawn by then is kept.
    """
    _check(settings)
    out, form = formats.of(settings.out)
    if not form.whole:
        _check_grid(settings)
    artist = Artist(settings, "cpu" if settings.processes > 1 else None)
    request = artist.request()
    record = out.with_name(f"{out.name}.json")
    if form.whole and (nfe := _finished(out, record, request, settings.n)) is not None:
        Chunks.remove_at(out)
        say(f"{settings.out} is there already, as asked for")
        return Finished(nfe=nfe, drawn=0, images_per_second=0.0)
    with Chunks.opened(out, request) as chunks:
        wanted = pipeline.calls(settings.first, settings.n, settings.batch_size)
        missing = [numbers for numbers in wanted if not chunks.has(numbers)]
        count = sum(len(_asked(numbers, settings)) for numbers in missing)
        seconds = _draw(artist, chunks, missing, settings.n - count)
        evaluations = sum(int(nfe) for _, nfe in _kept(chunks, wanted, settings, "nfe"))
        mean = pipeline.mean(evaluations, settings.n)
        if form.whole:  # before the result, which would be refused as somebody else's without it
            versions = {name: metadata.version(name) for name in ("dvae", "torch", "numpy")}
            files.write_json(record, {"request": request, "n": settings.n, "nfe": mean, "versions": versions})
        form.write(out, _kept(chunks, wanted, settings, "pixels"), settings.n, 2 if artist.vae else 1)
        chunks.remove()
    return Finished(nfe=mean, drawn=count, images_per_second=count / seconds if count else 0.0)


def _draw(artist: Artist, chunks: Chunks, missing: list[range], done: int) -> float:
    """Draw the missing chunks; seconds from the moment that the first process had loaded the run."""
    settings = artist.settings
    began = time.perf_counter()
    with Progress("images", settings.n, done) as progress:

        def after(numbers: range | None) -> None:
            nonlocal began
            if numbers is not None:
                images = len(_asked(numbers, settings))
                progress.update(progress.step + images, images)
            elif progress.step == progress.start:  # a process is ready: what it took to start would spoil the rate
                progress.begin()
                began = time.perf_counter()

        if settings.processes > 1 and missing:
            processes.draw(settings, chunks.folder, missing, after)
        else:
            draw_chunks(artist, chunks, missing, after)
    return time.perf_counter() - began


def draw_chunks(artist: Artist, chunks: Chunks, share: list[range], after: Callable[[range], None]) -> None:
    """Draw and keep chunk by chunk."""
    for numbers in share:
        chunks.write(numbers, *artist.draw(numbers))
        after(numbers)


def _kept(chunks: Chunks, wanted: list[range], settings: SampleConfig, what: str) -> Iterator[tuple[int, np.ndarray]]:
    """(number, pixels or nfe) of each image that is asked for."""
    for numbers in wanted:
        values = chunks.read(numbers, what)
        for number in _asked(numbers, settings):
            yield number, values[number - numbers.start]


def _asked(numbers: range, settings: SampleConfig) -> range:
    """Those of the numbers that are asked for: a fixed chunk may hold others."""
    return range(max(numbers.start, settings.first), min(numbers.stop, settings.first + settings.n))


def _check(settings: SampleConfig) -> None:
    for name, least in (("n", 1), ("first", 0), ("processes", 1)):
        if getattr(settings, name) < least:
            raise UserError(f"{name}={getattr(settings, name)}: use {least} or more")
    if settings.batch_size is not None and settings.batch_size < 1:
        raise UserError(f"batch_size={settings.batch_size}: use 1 or more, or leave it out for fixed chunks")


def _check_grid(settings: SampleConfig) -> None:
    if settings.n > formats.MOST_IN_A_GRID:
        raise UserError(
            f"out={settings.out} is one picture, too small for n={settings.n} (at most {formats.MOST_IN_A_GRID}): "
            "name a folder (out=NAME/), .npy, .zip or .tar"
        )


def _finished(out: Path, record: Path, request: dict[str, object], n: int) -> float | None:
    """Evaluations per image of what is there as asked for; None where nothing is. Raises UserError for anything else.

    A picture is replaced; what may hold 50,000 images is not.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    theirs = read(record) if record.is_file() else None
    if theirs is None:
        raise UserError(f"out={out} is there already, and not from this command: name another, or remove it")
    if unlike := difference(theirs["request"] | {"n": theirs["n"]}, request | {"n": n}):
        raise UserError(f"out={out} is there already, drawn with {unlike}: name another, or remove it")
    return float(theirs["nfe"])
