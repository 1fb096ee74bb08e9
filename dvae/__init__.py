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
    """Load the pipeline of a run folder or a bundle.

    Args:
        path: a run folder or a bundle.
        batch: images per network call. With None, images are computed in fixed chunks. An image then has the same bits
            in every request.
        device: where the models run. None selects a GPU if there is one, else the CPU.

    Raises UserError if `path` holds no bundle or an incomplete one.

    Example: `dvae.load("runs/demo").generate(8, seed=0)`
    """
    from dvae.inference import pipeline  # imported here because it imports torch, which takes seconds

    return pipeline.load(path, batch, device)


def pil(images: torch.Tensor) -> list[Image.Image]:
    """Convert uint8 tensors to Pillow images.

    `images` is (n, C, H, W) or (C, H, W), with C = 1 (gray) or 3 (RGB).
    """
    from PIL import Image

    pixels = (images[None] if images.ndim == 3 else images).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(each[:, :, 0] if each.shape[2] == 1 else each) for each in pixels]
