"""Sets of generated images against real ones, with the real-against-real floor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dvae.errors import UserError
from dvae.evaluation import features, metrics
from dvae.evaluation.measures import Measures, Metric
from dvae.evaluation.metrics import Features
from dvae.evaluation.protocol import Protocol
from dvae.tracking.console import Progress


def score(
    sets: Mapping[str, Sequence[torch.Tensor]],
    reference: torch.Tensor,
    heldout: torch.Tensor,
    *,
    seeds: Sequence[int],
    sampler: Mapping[str, Any],
    nfe: float,
    kid_subset_size: int,
    kid_subsets: int,
    cache: Path,
    reconstructions: torch.Tensor | None = None,
    reference_split: str = "train",
    batch: int = 64,
) -> dict[str, Any]:
    """KID-lite0 and FID-lite0 of each named set against `reference`, JSON-ready.

    sets: name -> one tensor (n, C, H, W), uint8, per seed, all of the same n. reference (M, C, H, W) and heldout
    (K, C, H, W) are real images, uint8, disjoint. Features of real images are kept in the folder `cache`.
    `reconstructions` of held-out images are one more set, of a size of its own.

    Returns {"protocol": {...}, "sets": {name: figures}, "floor": {"heldout": figures, "reference halves": figures}}
    with figures = {"n", "n_reference", "KID-lite0": {"mean", "se", "per_seed", "subset_std"}, "FID-lite0": {"mean",
    "se", "per_seed"}}. se is the standard error over seeds, null for one. The floor is real images scored as if they
    were a set: up to len(seeds) disjoint parts of `heldout`, n images each (all of them where there are fewer), and
    part of the reference against its rest. Raises UserError where there are too few images.
    """
    n = _common_count(sets, seeds)
    for what, count in (("a set", n), ("the reference", len(reference))):
        if count < kid_subset_size:
            raise UserError(
                f"kid_subset_size={kid_subset_size} is more than the {count} images of {what}: use {count} or less"
            )

    heldout = heldout[: n * len(seeds)]
    if reconstructions is not None and len(reconstructions) >= kid_subset_size:
        sets = {**sets, "reconstructions": [reconstructions]}
    total = sum(len(images) for images_of in sets.values() for images in images_of) + len(reference) + len(heldout)
    with Progress("features", total) as bar:

        def progress(count: int) -> None:
            bar.update(bar.step + count, count)

        real = _cached_features(reference, cache, batch, progress)
        unseen = _cached_features(heldout, cache, batch, progress)
        made = {name: [Features(metrics.features(i, batch, progress)) for i in images] for name, images in sets.items()}

    measures = Measures(
        metrics=(Metric.kid, Metric.fid), suffix="-lite0", kid_subset_size=kid_subset_size, kid_subsets=kid_subsets
    )
    halves = min(n, len(real) // 2)
    enough = max(len(unseen), halves)
    if enough < kid_subset_size:
        raise UserError(f"kid_subset_size={kid_subset_size} leaves no real images for the floor: use {enough} or less")
    floor = measures.floor(real, unseen, n, len(seeds))
    floor = {name: figures for name, figures in floor.items() if "KID-lite0" in figures}

    protocol = Protocol(
        backend=metrics.backend(),
        extractor=metrics.EXTRACTOR,
        weights_sha256=metrics.weights_sha256(),
        resize=metrics.RESIZE,
        image_size=reference.shape[-1],
        n=n,
        reference_split=reference_split,
        n_reference=len(reference),
        reference_sha256=_sha256(reference),
        seeds=list(seeds),
        kid_subset_size=kid_subset_size,
        kid_subsets=kid_subsets,
        kid_seed=measures.seed,
        sampler=dict(sampler),
        nfe=nfe,
        packages=metrics.packages(),
    )
    scored = {name: measures.figures(parts, real) for name, parts in made.items()}
    return {"protocol": asdict(protocol), "sets": scored, "floor": floor}


def _common_count(sets: Mapping[str, Sequence[torch.Tensor]], seeds: Sequence[int]) -> int:
    """n, which must be the same in every set for the figures to be comparable."""
    counts = {len(images) for images_of in sets.values() for images in images_of}
    if len(counts) != 1 or any(len(images_of) != len(seeds) for images_of in sets.values()):
        raise ValueError(f"want one tensor per seed, all of one length: {len(seeds)} seeds, lengths {sorted(counts)}")
    return counts.pop()


def _sha256(images: torch.Tensor) -> str:
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    digest.update(images.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _cached_features(images: torch.Tensor, cache: Path, batch: int, progress: Callable[[int], None]) -> Features:
    """Features of real images, kept in `cache` by hash of images, extractor and weights."""
    if not len(images):
        return Features(torch.empty(0, 1280))
    made_by = f"{metrics.EXTRACTOR} {metrics.weights_sha256()} {metrics.RESIZE} pooled"
    return features.cached(
        f"{_sha256(images)} {made_by}", cache, lambda: Features(metrics.features(images, batch, progress)), progress
    )
