"""Inpaint images: keep the known pixels (see known_pixels.py) and generate the others."""

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
"""Number of rounds in which the VAE fills in the unknown pixels before an image is inpainted."""
NAMED_MASKS = {
    "left": "the left half",
    "right": "the right half",
    "top": "the upper half",
    "bottom": "the lower half",
    "center": "the middle, half as wide and as high as the image",
    "border": "all but the middle, which is half as wide and as high as the image",
}
"""Names of masks, with a description of the known pixels."""


def named_mask(name: str, size: int) -> torch.Tensor:
    """Return the mask with this name, (size, size) bool, true at known pixels. Raises UserError for an unknown name."""
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
    """Inpaint images: keep the pixels where the mask is true and generate the others.

    x_hat is found by imputation (Rezende et al. 2014, appendix F). The unknown pixels are gray at first. In each round
    they are replaced by the pixels of the VAE's reconstruction.

    Args:
        core: the models and the sampler.
        images: (n, C, H, W) uint8.
        mask: (n, 1, H, W) bool, true at known pixels.
        seed: seed of the noise.
        noise_numbers: for each image, the image number of the seed whose noise it uses.
        label: class of all images, or of each.
        guidance: guidance weights.

    Raises UserError if the sampler does not move all images in the same steps, or if the refiner works in latent
    space, where pixels cannot be kept.
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
