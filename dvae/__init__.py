"""dvae: train generator-refiner image models (DiffuseVAE and its relatives) at scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dvae.utils.package import VERSION as __version__

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from PIL import Image

    from dvae.inference.pipeline import Pipeline

__all__ = ["__version__", "load", "pil"]


def load(path: str | Path, batch: int | None = None, device: str | torch.device | None = None) -> Pipeline:
    """Load the pipeline of a run folder or a bundle: `dvae.load("runs/demo").generate(8, seed=0)`.

    `batch`: images per network call (None: fixed chunks, so that an image has the same bits whatever else is drawn);
    `device`: None for a GPU where there is one. Raises UserError where there is none or it is not whole.
    """
    from dvae.inference import pipeline  # here, since it imports torch, which takes seconds

    return pipeline.load(path, batch, device)


def pil(images: torch.Tensor) -> list[Image.Image]:
    """Pillow images of (n, C, H, W) or (C, H, W) uint8, C = 1 (gray) or 3."""
    from PIL import Image

    pixels = (images[None] if images.ndim == 3 else images).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(each[:, :, 0] if each.shape[2] == 1 else each) for each in pixels]
