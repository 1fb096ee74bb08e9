"""Inpainting: known pixels are kept, see known_pixels.py, and the others are drawn anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dvae.data.images import to_float, to_uint8
from dvae.diffusion.conditioning import Conditioning
from dvae.diffusion.guidance import Guidance
from dvae.errors import UserError, suggest
from dvae.inference.batching import GeneratedImages
from dvae.inference.inference_core import ClassLabels, InferenceCore
from dvae.inference.noise import KeyedNoise
from dvae.inference.refine import refine_images

IMPUTATION_ROUNDS = 8
"""Rounds in which unknown pixels are filled in by the encoder before an image is inpainted."""
NAMED_MASKS = {
    "left": "the left half",
    "right": "the right half",
    "top": "the upper half",
    "bottom": "the lower half",
    "center": "the middle, half as wide and as high as the image",
    "border": "all but the middle, which is half as wide and as high as the image",
}
"""Masks that have a name, by what is known."""


def named_mask(name: str, size: int) -> torch.Tensor:
    """The mask (size, size) of that name, true where pixels are known. Raises UserError for an unknown name."""
    if name not in NAMED_MASKS:
        raise UserError(f"mask={name}: {suggest(name, NAMED_MASKS)}, or a PNG that is white where the image is known")
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
    core: InferenceCore,
    images: torch.Tensor,
    mask: torch.Tensor,
    seed: int,
    noise_numbers: Sequence[int],
    label: ClassLabels = None,
    guidance: Guidance | float = 1.0,
) -> GeneratedImages:
    """Images (n, C, H, W) uint8 as they are where mask (n, 1, H, W) is true, and drawn anew elsewhere.

    x_hat is found by imputation: unknown pixels are gray at first, then those of the reconstruction, a few times
    over (Rezende et al. 2014, appendix F). Raises UserError for a sampler whose images stand at no common time, and in
    latent space, where pixels cannot be kept.
    """
    core.require_pixels("inpainting")
    if not core.sampler.lockstep:
        raise UserError("inpainting needs a sampler that moves all images in the same steps: use sampler=ddim or em")
    x, known = to_float(images).to(core.device), mask.to(core.device)
    imputed = torch.where(known, x, 0.0)
    for _ in range(IMPUTATION_ROUNDS):
        encoded = core.encode(imputed)
        imputed = torch.where(known, x, encoded.x_hat)
    conditioning = Conditioning(encoded.x_hat, encoded.z, core.class_numbers(label, len(images)))
    noise = KeyedNoise(seed, noise_numbers)
    refined, nfe = refine_images(core, conditioning, noise, guidance=guidance, known=(x, known))
    vae = to_uint8(conditioning.x_hat).cpu() if core.models.has_generator else None
    classes = None if conditioning.label is None else conditioning.label.cpu()
    return GeneratedImages(vae, torch.where(mask, images, to_uint8(refined)), nfe, classes)
