"""Inpainting: known pixels are kept at every step of a sampler (Song et al. 2021b, appendix I.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from dvae.data.images import to_float, to_uint8
from dvae.diffusion.conditioning import Conditioning
from dvae.diffusion.kernels import Diffusion, Matching
from dvae.diffusion.model import OnStep
from dvae.errors import UserError, suggest
from dvae.inference.batching import GeneratedImages
from dvae.inference.noise import Noise

if TYPE_CHECKING:
    from dvae.diffusion.guidance import Guidance
    from dvae.inference.pipeline import Classes, Pipeline

IMPUTATIONS = 8
"""Rounds in which unknown pixels are filled in by the encoder before an image is inpainted."""
KNOWN = {
    "left": "the left half",
    "right": "the right half",
    "top": "the upper half",
    "bottom": "the lower half",
    "center": "the middle, half as wide and as high as the image",
    "border": "all but the middle, which is half as wide and as high as the image",
}
"""Masks that have a name, by what is known."""


def keep_known(
    diffusion: Diffusion, x0: torch.Tensor, known: torch.Tensor, noise: Callable[[int], torch.Tensor]
) -> OnStep:
    """An on_step that puts the known pixels, noised afresh to the level just reached, into every component of u.

    x0 (B, C, H, W) is the clean state, known (B, 1, H, W) bool; noise(i) ~ N(0, I) has the shape of u. At t = 0 the
    known pixels are x0 itself.
    """

    def on_step(i: int, t: float, u: torch.Tensor) -> torch.Tensor:
        if t == 0.0:
            return torch.where(known, diffusion.initial_state(x0).to(u.dtype), u)
        start = noise(2 * i + 1) if diffusion.matching is Matching.dsm else None
        return torch.where(known, diffusion.perturb(diffusion.initial_state(x0, start), t, noise(2 * i)).to(u.dtype), u)

    return on_step


def mask_of(name: str, size: int) -> torch.Tensor:
    """The mask (size, size) of that name, true where pixels are known. Raises UserError for an unknown name."""
    if name not in KNOWN:
        raise UserError(f"mask={name}: {suggest(name, KNOWN)}, or a PNG that is white where the image is known")
    half, quarter = size // 2, size // 4
    middle = slice(quarter, size - quarter)
    places = {
        "left": (slice(None), slice(half)),
        "right": (slice(None), slice(half, None)),
        "top": (slice(half), slice(None)),
        "bottom": (slice(half, None), slice(None)),
        "center": (middle, middle),
        "border": (middle, middle),
    }
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[places[name]] = True
    return ~mask if name == "border" else mask


@torch.no_grad()
def inpaint(
    pipeline: Pipeline,
    images: torch.Tensor,
    mask: torch.Tensor,
    seed: int,
    numbers: Sequence[int],
    label: Classes = None,
    guidance: Guidance | float = 1.0,
) -> GeneratedImages:
    """Images (n, C, H, W) uint8 as they are where mask (n, 1, H, W) is true, and drawn anew elsewhere.

    x_hat is found by imputation: unknown pixels are gray at first, then those of the reconstruction, a few times
    over (Rezende et al. 2014, appendix F). Raises UserError for a sampler whose images stand at no common time, and in
    latent space, where pixels cannot be kept.
    """
    pipeline.need_pixels("inpainting")
    if not pipeline.sampler.lockstep:
        raise UserError("inpainting needs a sampler that moves all images in the same steps: use sampler=ddim or em")
    known, mask_there = to_float(images).to(pipeline.device), mask.to(pipeline.device)
    filled = torch.where(mask_there, known, 0.0)
    for _ in range(IMPUTATIONS):
        found = pipeline.encode(filled)
        filled = torch.where(mask_there, known, found.x_hat)
    conditioning = Conditioning(found.x_hat, found.z, pipeline.classes(label, len(images)))
    drawn, nfe = pipeline.refined(conditioning, Noise(seed, numbers), guidance=guidance, known=(known, mask_there))
    vae = to_uint8(conditioning.x_hat).cpu() if pipeline.models.has_generator else None
    classes = None if conditioning.label is None else conditioning.label.cpu()
    return GeneratedImages(vae, torch.where(mask, images, to_uint8(drawn)), nfe, classes)
