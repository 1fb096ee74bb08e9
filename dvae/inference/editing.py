"""What is done to images that are there: reconstructed, interpolated, moved along a direction.

An image is described by its z (with the x_hat that it decodes to) and the noise that it is refined with; each can be
kept while the other changes (Pandey et al. 2022, DiffuseVAE, section 4.2).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dvae.data.images import to_uint8
from dvae.diffusion.conditioning import Conditioning
from dvae.errors import UserError
from dvae.inference.batching import GeneratedImages, mean, together
from dvae.inference.noise import Between, Noise, linear, spherical
from dvae.registry.priors.normal import Normal

if TYPE_CHECKING:
    from dvae.diffusion.guidance import Guidance
    from dvae.inference.directions import Direction
    from dvae.inference.pipeline import Classes, Pipeline

Images = torch.Tensor | int | Sequence[int]
"""Images (n, C, H, W) uint8 or (C, H, W), or numbers of images of a seed, as `Pipeline.generate` draws them."""

Move = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""move(z (n, *latent), strength (n,)): z somewhere else."""


@dataclass(frozen=True)
class Start:
    """Images to begin with."""

    conditioning: Conditioning
    """z is the posterior mean, or drawn from the prior."""
    numbers: Sequence[int]
    """Whose noise of the seed each has."""

    def __len__(self) -> int:
        return len(self.numbers)


def start(
    pipeline: Pipeline, images: Images, seed: int, label: Classes = None, numbers: Sequence[int] | None = None
) -> Start:
    """Images to begin with; those that are given have the noise of `numbers` (None: 0, 1, ...).

    Raises UserError for images that do not fit the run, and where images are given to a run without an encoder.
    """
    if not isinstance(images, torch.Tensor):
        own = [images] if isinstance(images, int) else list(images)
        return Start(pipeline.drawn_for(own, seed, label), own)
    if "encoder" not in pipeline.models.trained_parts():
        raise UserError("this run has no encoder, which finds the z of an image: use numbers of images of a seed")
    images = checked(pipeline, images)
    conditioning = pipeline.encode(images)
    return Start(
        Conditioning(conditioning.x_hat, conditioning.z, pipeline.classes(label, len(images))),
        numbers or range(len(images)),
    )


def pair(pipeline: Pipeline, a: Images, b: Images, seed: int, label: Classes = None) -> tuple[Start, Start]:
    """What is interpolated between. Of images a[i] has noise 2 i and b[i] noise 2 i + 1."""
    starts = []
    for side, images in enumerate((a, b)):
        n = len(images) if isinstance(images, torch.Tensor) and images.ndim == 4 else 1
        starts.append(start(pipeline, images, seed, label, range(side, 2 * n, 2)))
    return starts[0], starts[1]


def checked(pipeline: Pipeline, images: torch.Tensor) -> torch.Tensor:
    """Images as (n, C, H, W). Raises UserError where they are not uint8 of the run's shape."""
    images = images[None] if images.ndim == 3 else images
    size = pipeline.config.image_size
    wanted = (pipeline.config.channels, size, size)
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != wanted or len(images) == 0:
        found = f"images are {tuple(images.shape)} {images.dtype}"
        raise UserError(f"{found}: this run takes (n, {', '.join(map(str, wanted))}) uint8")
    return images


def reconstruct(pipeline: Pipeline, start: Start, seed: int, guidance: Guidance | float = 1.0) -> GeneratedImages:
    """The images themselves, through z."""
    return _drawn(pipeline, start.conditioning.z, start.conditioning.label, Noise(seed, start.numbers), 1, guidance)


def along(pipeline: Pipeline, direction: Direction | torch.Tensor | int) -> Move:
    """How a direction moves z; a vector is added once at strength 1, and a principal coordinate is put at the strength.

    Raises UserError where it is not of z's shape, or there is no such coordinate.
    """
    if isinstance(direction, int):
        return slider(pipeline, direction)
    vector = direction if isinstance(direction, torch.Tensor) else direction.vector
    if tuple(vector.shape) != pipeline.models.io.latent:
        raise UserError(f"direction {tuple(vector.shape)} does not fit the z {pipeline.models.io.latent} of this run")
    if not isinstance(direction, torch.Tensor):
        return direction.move
    return lambda z, strength: z + strength.view(-1, *[1] * (z.ndim - 1)) * vector.to(z)


def edit(
    pipeline: Pipeline,
    start: Start,
    move: Move,
    strengths: Sequence[float],
    seed: int,
    guidance: Guidance | float = 1.0,
) -> GeneratedImages:
    """Each image at every strength, (n * strengths, ...): its z moved (see `along`), with its own noise.

    Raises UserError where images of a seed have no z of their own.
    """
    if not start.conditioning.z.numel():
        raise UserError("edit: this run draws no z besides its noise, and so has nothing to move: give images=")
    rows = len(strengths)
    by = torch.tensor(strengths, device=pipeline.device).repeat(len(start))
    z = move(start.conditioning.z.repeat_interleave(rows, 0), by)
    noise = Noise(seed, start.numbers)[[row // rows for row in range(len(start) * rows)]]
    return _drawn(pipeline, z, _repeated(start.conditioning.label, rows), noise, rows, guidance)


def interpolate(
    pipeline: Pipeline,
    a: Start,
    b: Start,
    space: Between,
    steps: int,
    seed: int,
    guidance: Guidance | float = 1.0,
) -> GeneratedImages:
    """`steps` images from each of a to that of b, (n * steps, ...); the first is that of a itself.

    z goes straight; where the prior is N(0, I) along the arc, on which |z| stays what the decoder was trained with (a
    fitted prior has no such shell). Noise goes along the arc, since it must stay N(0, I). The class, if any, changes
    half-way, but with the noise alone. Raises UserError where there is no z or no noise to interpolate.
    """
    if steps < 2:
        raise UserError(f"steps={steps}: use 2 or more, both ends are among them")
    if len(a) != len(b):
        raise UserError(f"{len(a)} and {len(b)} images: interpolation goes from each of the first to one of the others")
    latent, drawn = pipeline.models.latent_space, not a.conditioning.z.numel()
    if latent and not drawn:
        raise UserError(
            "in latent space a given image has no noise to interpolate: use images of a seed (images=drawn)"
        )
    if drawn and space is Between.z:
        raise UserError("space=z: this run draws no z besides its noise: use space=noise")
    weights = torch.linspace(0.0, 1.0, steps, dtype=torch.float64).repeat(len(a))
    rows = torch.arange(len(a)).repeat_interleave(steps)
    here, there = a.conditioning[rows], b.conditioning[rows]
    moves_z = space is not Between.noise and not drawn
    path = spherical if isinstance(pipeline.prior, Normal) else linear
    z = path(here.z, there.z, weights) if moves_z else here.z
    label = here.label
    if label is not None and there.label is not None and space is not Between.noise:
        label = torch.where(weights.to(label.device) < 0.5, label, there.label)
    own = Noise(seed, a.numbers)[rows.tolist()]
    towards = [b.numbers[row] for row in rows.tolist()]
    noise = own if space is Between.z else Noise(seed, own.numbers, towards, weights.tolist())
    return _drawn(pipeline, z, label, noise, steps, guidance)


def slider(pipeline: Pipeline, component: int) -> Move:
    """Puts the principal coordinate `component` of z, from 1, at the strength. Raises UserError where there is none."""
    components = pipeline.models.denoiser.config.pca_components
    if not 1 <= component <= components:
        known = f"use 1 to {components}" if components else "train with denoiser.pca_components=32"
        raise UserError(f"component={component}: the refiner knows {components} principal components: {known}")
    whitening = pipeline.models.denoiser.whitening
    return lambda z, strength: whitening.moved(z, component - 1, strength.to(z.device, z.dtype))


def _repeated(label: torch.Tensor | None, times: int) -> torch.Tensor | None:
    return None if label is None else label.repeat_interleave(times)


def _drawn(
    pipeline: Pipeline,
    z: torch.Tensor,
    label: torch.Tensor | None,
    noise: Noise,
    rows: int,
    guidance: Guidance | float,
) -> GeneratedImages:
    """Images of z (n * rows, *latent), those of one result in the same calls at the same places, whatever n is.

    In latent space z is all that there is to a given image, and nothing of it is refined.
    """
    refines = not (pipeline.models.latent_space and z.numel())
    vae, refined, nfe = [], [], []
    for part in torch.arange(len(noise)).split(together(rows) * rows if pipeline.batch is None else len(noise)):
        mine = None if label is None else label[part]
        if pipeline.models.latent_space and refines:
            conditioning = Conditioning.nothing(z.new_empty(len(part), *pipeline.models.io.latent), mine)
        else:
            conditioning = Conditioning(pipeline.decode(z[part]), z[part], mine)
            vae.append(to_uint8(conditioning.x_hat).cpu())
        if refines:
            images, counted = pipeline.refined(conditioning, noise[part.tolist()], guidance=guidance)
            refined.append(to_uint8(images))
            nfe.append(counted)
    shown = torch.cat(vae) if vae else None
    counts = torch.cat(nfe) if nfe else torch.zeros(len(noise), dtype=torch.int64)
    pipeline.nfe = mean(int(counts.sum()), len(counts))
    classes = None if label is None else label.cpu()
    if not refines:
        assert shown is not None
        return GeneratedImages(None, shown, counts, classes)
    return GeneratedImages(shown if pipeline.models.has_generator else None, torch.cat(refined), counts, classes)


def fingerprint(values: torch.Tensor) -> str:
    """Hash of a vector or mask, for the record of what was drawn."""
    return hashlib.sha256(values.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
