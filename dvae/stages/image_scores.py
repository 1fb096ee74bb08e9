"""Scores of generated image sets against the images of a run, with the run's evaluate settings."""

from __future__ import annotations

from typing import Any

import torch

from dvae.config.schema import RunConfig
from dvae.data.shards.reader import Shards
from dvae.runs.folder import Run
from dvae.utils.evenly_spaced import evenly_spaced


def score_images(
    run: Run,
    config: RunConfig,
    sets: dict[str, list[torch.Tensor]],
    seeds: list[int],
    train: Shards,
    heldout: Shards,
    nfe: float,
    sampler: dict[str, Any],
    reconstructions: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Score generated sets against training and held-out images.

    Args:
        run: The run. Features of real images are cached in its folder.
        config: Settings of the run.
        sets: Images by the name of the set, one tensor (n, C, H, W), uint8, per seed, with n = evaluate.n.
        seeds: Seeds of the sets.
        train: Training images. At most evaluate.n_reference of them are used.
        heldout: Held-out images.
        nfe: Network evaluations per image. It is stored with the scores.
        sampler: Settings of the sampler. They are stored with the scores.
        reconstructions: Reconstructions (n, C, H, W), uint8, to score as well; None: none.
    """
    from dvae.evaluation.scorer import score_tensors  # here, because evaluate.metrics=false needs no torch-fidelity

    settings = config.evaluate
    return score_tensors(
        sets,
        train.read(evenly_spaced(len(train), settings.n_reference)),
        heldout.read(evenly_spaced(len(heldout), settings.n * len(seeds))),
        seeds=seeds,
        sampler=sampler,
        nfe=nfe,
        kid_subset_size=settings.kid_subset_size,
        kid_subsets=settings.kid_subsets,
        cache=run.path / "cache",
        reconstructions=reconstructions,
        batch=settings.batch,
    )
