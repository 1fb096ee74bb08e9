"""Form the batches of inference. With fixed chunks an image has the same bits in every request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

CHUNK_SIZE = 16
"""Number of images in a fixed chunk, used if no batch size is given.

It reaches 80% of the speed of batches of 64 (the demo's networks on one core). A request that begins with image 0
computes at most 15 images that it does not need."""


@dataclass(frozen=True)
class GeneratedImages:
    """Images that were generated together."""

    vae: torch.Tensor | None
    """The VAE's images that were refined, (n, C, H, W) uint8; None if the run generates nothing before refinement."""
    refined: torch.Tensor
    """Refined images, (n, C, H, W) uint8. In latent space given images are not refined; here are the decoder's
    images."""
    nfe: torch.Tensor
    """Counted network evaluations of each image, (n,), int64."""
    label: torch.Tensor | None = None
    """Class of each image, (n,), int64, -1 for no class; None if the run has no classes."""
    estimates: torch.Tensor | None = None
    """Denoised estimates of each image at K sampler steps, (n, K, C, H, W) uint8."""


def chunk_ranges(first: int, n: int, batch: int | None, chunk: int = CHUNK_SIZE) -> list[range]:
    """Split the images first, ..., first + n - 1 into ranges that are computed together.

    Without `batch` the ranges are whole chunks [chunk c, chunk c + chunk). They may contain images that are not
    requested. An image is always computed with the same others, so it has the same bits in every request. With
    `batch` each range has `batch` requested images; the last range may have fewer.
    """
    end = first + n
    if batch is None:
        return [range(start, start + chunk) for start in range(first - first % chunk, end, chunk)]
    return [range(start, min(start + batch, end)) for start in range(first, end, batch)]


def results_per_chunk(images_per_result: int) -> int:
    """Return how many results with `images_per_result` images each share a fixed chunk; at least 1."""
    return max(1, CHUNK_SIZE // images_per_result)


def batch_rows(n: int, size: int, fixed: bool) -> Iterator[tuple[torch.Tensor, int]]:
    """Split n images into batches: yield the rows of a batch and the number of rows that are not padding.

    With `fixed` every batch has exactly `size` rows. The last batch is padded with copies of the last image.
    """
    for start in range(0, n, size):
        count = min(size, n - start)
        yield torch.arange(start, start + (size if fixed else count)).clamp(max=n - 1), count


@contextmanager
def single_thread(enabled: bool) -> Iterator[None]:
    """If `enabled`, compute on one CPU thread while the block runs.

    With several threads, their number decides how sums are split, and thereby how they are rounded.
    """
    before = torch.get_num_threads()
    if enabled:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def mean_nfe(evaluations: int, images: int) -> float:
    """Return the network evaluations per image, as an int if the quotient is a whole number."""
    return evaluations // images if evaluations % images == 0 else evaluations / images
