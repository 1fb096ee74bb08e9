"""dvae: train generator-refiner image models (DiffuseVAE and its relatives) at scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from dvae.pipeline import Pipeline

__version__ = "0.1.0"


def load(path: str | Path, batch: int | None = None, device: str | torch.device | None = None) -> Pipeline:
    """The pipeline of a run folder or a bundle: `dvae.load("runs/demo").generate(8, seed=0)`; see dvae/pipeline.py.

    `batch`: images per network call (None: fixed chunks, so that an image has the same bits whatever else is drawn);
    `device`: None for a GPU where there is one. Raises UserError where there is none or it is not whole.
    """
    from dvae import pipeline  # here, since it imports torch, which takes seconds

    return pipeline.load(path, batch, device)
