"""What is computed together: fixed chunks, with which an image has the same bits in every request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

CHUNK_SIZE = 16
"""Images that are computed together where no batch size is asked for: most of the speed of larger batches (80% of that
of 64 on one core, with the demo's networks), and at most 15 images are drawn that nobody asked for."""


@dataclass(frozen=True)
class GeneratedImages:
    """Images that were drawn together."""

    vae: torch.Tensor | None
    """What they were refined from, (n, C, H, W) uint8; None where nothing is drawn before refinement."""
    refined: torch.Tensor
    """(n, C, H, W) uint8; in latent space, where given images are not refined, what the decoder makes."""
    nfe: torch.Tensor
    """Network evaluations of each, (n,), int64, as counted."""
    label: torch.Tensor | None = None
    """Class of each, (n,), int64, -1 where none is given; None where the run has no classes."""
    estimates: torch.Tensor | None = None
    """(n, K, C, H, W) uint8: what the network took the image for, at K steps on the way."""


def chunk_ranges(first: int, n: int, batch: int | None, chunk: int = CHUNK_SIZE) -> list[range]:
    """The numbers that are drawn together, call by call, for the images first..first + n - 1.

    Without `batch` these are whole chunks [chunk c, chunk c + chunk): what is asked for besides never changes what an
    image is computed with, so it has the same bits. With `batch` they are so many at a time, and no others.
    """
    end = first + n
    if batch is None:
        return [range(start, start + chunk) for start in range(first - first % chunk, end, chunk)]
    return [range(start, min(start + batch, end)) for start in range(first, end, batch)]


def results_per_chunk(images_per_result: int) -> int:
    """How many results of `images_per_result` images each share a fixed chunk."""
    return max(1, CHUNK_SIZE // images_per_result)


def batch_rows(n: int, size: int, fixed: bool) -> Iterator[tuple[torch.Tensor, int]]:
    """The rows of n images that are computed together, call by call, and how many of them count.

    With `fixed` a call has always `size` rows: the last image fills it up.
    """
    for start in range(0, n, size):
        count = min(size, n - start)
        yield torch.arange(start, start + (size if fixed else count)).clamp(max=n - 1), count


@contextmanager
def single_thread(enabled: bool) -> Iterator[None]:
    """Compute on one thread of the CPU while the block runs, if `enabled`: with more, the number of threads decides how
    sums are split, and so their rounding."""
    before = torch.get_num_threads()
    if enabled:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def mean_nfe(evaluations: int, images: int) -> float:
    """Evaluations per image, a whole number where it is one."""
    return evaluations // images if evaluations % images == 0 else evaluations / images
