"""Reconstruct, interpolate and edit images.

An image is described by its z, which decodes to x_hat, and by the noise that it is refined with. One can be kept while
the other changes (Pandey et al. 2022, DiffuseVAE, section 4.2).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dvae.data.images import to_uint8
from dvae.diffusion.conditioning import Conditioning
from dvae.diffusion.guidance import Guidance
from dvae.errors import UserError
from dvae.inference.batching import GeneratedImages, mean_nfe, results_per_chunk
from dvae.inference.directions import Direction
from dvae.inference.inference_core import ClassLabels, InferenceCore
from dvae.inference.noise import InterpolationSpace, KeyedNoise, lerp, slerp
from dvae.inference.refine import refine_images
from dvae.registry.priors.normal import Normal

ImageInput = torch.Tensor | int | Sequence[int]
"""Images (n, C, H, W) or (C, H, W) uint8, or the numbers of images that `Pipeline.generate` generates from a seed."""

LatentEdit = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""latent_edit(z (n, *latent), strength (n,)) returns the edited z, of the same shape."""


@dataclass(frozen=True)
class SourceImages:
    """The images from which reconstruction, interpolation or an edit starts."""

    conditioning: Conditioning
    """z, x_hat and class. z is the posterior mean of a given image, or a sample of the prior."""
    noise_numbers: Sequence[int]
    """For each image, the image number of the seed whose noise it is refined with."""

    def __len__(self) -> int:
        return len(self.noise_numbers)


def source_images(
    core: InferenceCore,
    images: ImageInput,
    seed: int,
    label: ClassLabels = None,
    noise_numbers: Sequence[int] | None = None,
) -> SourceImages:
    """Encode given images, or sample z for images of the seed.

    Given images use the noise of the image numbers `noise_numbers` (None: 0, 1, ...). Images of the seed use their own.

    Raises UserError if the images do not fit the run, or if images are given and the run has no encoder.
    """
    if not isinstance(images, torch.Tensor):
        numbers = [images] if isinstance(images, int) else list(images)
        return SourceImages(core.conditioning_of(numbers, seed, label), numbers)
    if "encoder" not in core.models.trained_parts():
        raise UserError("this run has no encoder to compute the z of an image: use numbers of images of a seed")
    images = check_images(core, images)
    encoded = core.encode(images)
    conditioning = Conditioning(encoded.x_hat, encoded.z, core.class_numbers(label, len(images)))
    return SourceImages(conditioning, noise_numbers or range(len(images)))


def source_pairs(
    core: InferenceCore, a: ImageInput, b: ImageInput, seed: int, label: ClassLabels = None
) -> tuple[SourceImages, SourceImages]:
    """Return the two ends of interpolations.

    If a and b are images, a[i] uses noise number 2 i and b[i] uses noise number 2 i + 1.
    """
    sources = []
    for side, images in enumerate((a, b)):
        n = len(images) if isinstance(images, torch.Tensor) and images.ndim == 4 else 1
        sources.append(source_images(core, images, seed, label, range(side, 2 * n, 2)))
    return sources[0], sources[1]


def check_images(core: InferenceCore, images: torch.Tensor) -> torch.Tensor:
    """Return images as (n, C, H, W). Raises UserError if they are not uint8 or do not have the run's shape."""
    images = images[None] if images.ndim == 3 else images
    size = core.config.image_size
    expected = (core.config.channels, size, size)
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != expected or len(images) == 0:
        found = f"images are {tuple(images.shape)} {images.dtype}"
        raise UserError(f"{found}: this run takes (n, {', '.join(map(str, expected))}) uint8")
    return images


def reconstruct(
    core: InferenceCore, source: SourceImages, seed: int, guidance: Guidance | float = 1.0
) -> GeneratedImages:
    """Reconstruct images: decode z and refine the result."""
    conditioning = source.conditioning
    noise = KeyedNoise(seed, source.noise_numbers)
    return _decode_and_refine(core, conditioning.z, conditioning.label, noise, 1, guidance)


def latent_edit(core: InferenceCore, direction: Direction | torch.Tensor | int) -> LatentEdit:
    """Return the edit of z that belongs to a direction.

    - A `Direction` moves z as its method `move` says.
    - A vector is multiplied by the strength and added to z.
    - The number of a principal component, from 1, sets this coordinate of z to the strength.

    Raises UserError if the direction does not have the shape of z, or if there is no such component.
    """
    if isinstance(direction, int):
        return principal_coordinate_edit(core, direction)
    vector = direction if isinstance(direction, torch.Tensor) else direction.vector
    if tuple(vector.shape) != core.models.shapes.latent:
        raise UserError(f"direction {tuple(vector.shape)} does not fit the z {core.models.shapes.latent} of this run")
    if not isinstance(direction, torch.Tensor):
        return direction.move
    return lambda z, strength: z + strength.view(-1, *[1] * (z.ndim - 1)) * vector.to(z)


def edit(
    core: InferenceCore,
    source: SourceImages,
    latent_edit: LatentEdit,
    strengths: Sequence[float],
    seed: int,
    guidance: Guidance | float = 1.0,
) -> GeneratedImages:
    """Edit each image at every strength. z changes, and the noise stays.

    Returns n * len(strengths) images; all strengths of an image are adjacent. Raises UserError if the images have no z:
    the run has no encoder, or its refiner works in latent space and the images are images of a seed.
    """
    conditioning = source.conditioning
    if not conditioning.z.numel():
        raise UserError("edit: this run draws no z besides its noise, so there is no z to move: give images=")
    rows = len(strengths)
    repeated = torch.tensor(strengths, device=core.device).repeat(len(source))
    z = latent_edit(conditioning.z.repeat_interleave(rows, 0), repeated)
    noise = KeyedNoise(seed, source.noise_numbers)[[row // rows for row in range(len(source) * rows)]]
    label = None if conditioning.label is None else conditioning.label.repeat_interleave(rows)
    return _decode_and_refine(core, z, label, noise, rows, guidance)


def interpolate(
    core: InferenceCore,
    a: SourceImages,
    b: SourceImages,
    space: InterpolationSpace,
    steps: int,
    seed: int,
    guidance: Guidance | float = 1.0,
) -> GeneratedImages:
    """Interpolate in `steps` images from each image of a to the corresponding image of b.

    - z follows a straight line. If the prior is N(0, I), z follows the arc instead: there |z| keeps the length that the
      decoder was trained with. Samples of a fitted prior have no common length.
    - Noise follows the arc, because it must stay N(0, I).
    - The class changes half-way, unless only the noise is interpolated.

    Returns n * steps images; the images of a pair are adjacent, and both ends are included. Raises UserError if there
    is no z or no noise to interpolate.
    """
    _check_interpolation(core, a, b, space, steps)
    weights = torch.linspace(0.0, 1.0, steps, dtype=torch.float64).repeat(len(a))
    rows = torch.arange(len(a)).repeat_interleave(steps)
    first, last = a.conditioning[rows], b.conditioning[rows]
    path = slerp if isinstance(core.prior, Normal) else lerp
    moves_z = space is not InterpolationSpace.noise and first.z.numel() > 0
    z = path(first.z, last.z, weights) if moves_z else first.z
    label = first.label
    if label is not None and last.label is not None and space is not InterpolationSpace.noise:
        label = torch.where(weights.to(label.device) < 0.5, label, last.label)
    noise = KeyedNoise(seed, a.noise_numbers)[rows.tolist()]
    if space is not InterpolationSpace.z:
        targets = [b.noise_numbers[row] for row in rows.tolist()]
        noise = KeyedNoise(seed, noise.numbers, targets, weights.tolist())
    return _decode_and_refine(core, z, label, noise, steps, guidance)


def _check_interpolation(
    core: InferenceCore, a: SourceImages, b: SourceImages, space: InterpolationSpace, steps: int
) -> None:
    """Raise UserError if a and b do not match, or if there is nothing to interpolate in this space."""
    if steps < 2:
        raise UserError(f"steps={steps}: use 2 or more, both ends are among them")
    if len(a) != len(b):
        raise UserError(f"{len(a)} and {len(b)} images: interpolation goes from each of the first to one of the others")
    has_z = a.conditioning.z.numel() > 0
    if core.models.latent_space and has_z:
        raise UserError(
            "in latent space a given image has no noise to interpolate: use images of a seed (images=drawn)"
        )
    if not has_z and space is InterpolationSpace.z:
        raise UserError("space=z: this run draws no z besides its noise: use space=noise")


def principal_coordinate_edit(core: InferenceCore, component: int) -> LatentEdit:
    """Return the edit that sets the principal coordinate `component` of z, from 1, to the strength.

    Raises UserError if the refiner has no such component.
    """
    components = core.models.denoiser.config.pca_components
    if not 1 <= component <= components:
        known = f"use 1 to {components}" if components else "train with denoiser.pca_components=32"
        raise UserError(f"component={component}: the refiner knows {components} principal components: {known}")
    whitening = core.models.denoiser.whitening
    return lambda z, strength: whitening.with_coordinate(z, component - 1, strength.to(z.device, z.dtype))


def _decode_and_refine(
    core: InferenceCore,
    z: torch.Tensor,
    label: torch.Tensor | None,
    noise: KeyedNoise,
    images_per_result: int,
    guidance: Guidance | float,
) -> GeneratedImages:
    """Decode z (n * images_per_result, *latent) and refine the images.

    With fixed chunks, an image has the same place in a batch for every n, so its bits do not depend on n. In latent
    space a given image is decoded but not refined, because z already describes it completely.
    """
    refines = not (core.models.latent_space and z.numel())
    vae, refined, nfe = [], [], []
    size = results_per_chunk(images_per_result) * images_per_result if core.batch is None else len(noise)
    for rows in torch.arange(len(noise)).split(size):
        labels = None if label is None else label[rows]
        if core.models.latent_space and refines:
            conditioning = Conditioning.unconditional(z.new_empty(len(rows), *core.models.shapes.latent), labels)
        else:
            conditioning = Conditioning(core.decode(z[rows]), z[rows], labels)
            vae.append(to_uint8(conditioning.x_hat).cpu())
        if refines:
            images, evaluations = refine_images(core, conditioning, noise[rows.tolist()], guidance=guidance)
            refined.append(to_uint8(images))
            nfe.append(evaluations)
    decoded = torch.cat(vae) if vae else None
    counts = torch.cat(nfe) if nfe else torch.zeros(len(noise), dtype=torch.int64)
    core.nfe = mean_nfe(int(counts.sum()), len(counts))
    classes = None if label is None else label.cpu()
    if not refines:
        assert decoded is not None
        return GeneratedImages(None, decoded, counts, classes)
    return GeneratedImages(decoded if core.models.has_generator else None, torch.cat(refined), counts, classes)


def fingerprint(values: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's values, for the record of a request."""
    return hashlib.sha256(values.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
