"""Run the sampler: refine one batch, refine many images batch by batch, or generate one batch of a seed."""

from __future__ import annotations

import torch

from dvae.data.images import to_uint8
from dvae.diffusion.conditioning import Conditioning
from dvae.diffusion.guidance import Guidance, GuidedDenoiser
from dvae.diffusion.recording import RecordingDenoiser
from dvae.diffusion.sampler_model import OnStep, SamplerModel
from dvae.errors import UserError
from dvae.inference.batching import CHUNK_SIZE, GeneratedImages, mean_nfe
from dvae.inference.inference_core import ClassLabels, InferenceCore, ProgressCallback
from dvae.inference.known_pixels import replace_known_pixels
from dvae.inference.noise import KeyedNoise, SharedVariable
from dvae.utils.evenly_spaced import evenly_spaced

UNGUIDED = Guidance()


def refine_batch(
    core: InferenceCore,
    conditioning: Conditioning,
    noise: KeyedNoise,
    guidance: Guidance | float,
    known: tuple[torch.Tensor, torch.Tensor] | None = None,
    estimates: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Refine one batch.

    Args:
        core: the models and the sampler.
        conditioning: x_hat, z and class of n images.
        noise: their noise.
        guidance: guidance weights; a number is the weight of x_hat, z and class together.
        known: (images in [-1, 1], mask (n, 1, H, W)). Pixels are kept where the mask is true. With `known`, no
            estimates are returned.
        estimates: number of denoised estimates to record, at evenly spaced steps.

    Returns images (n, C, H, W) in [-1, 1], the network evaluations of each image (n,), and the recorded estimates.
    """
    denoiser, shapes = core.models.denoiser, core.models.denoiser.shapes
    shape = (shapes.k * shapes.channels, shapes.image_size, shapes.image_size)

    def normal(purpose: str) -> torch.Tensor:
        return noise.sample(purpose, shape).to(core.device, memory_format=torch.channels_last)

    x_hat = conditioning.x_hat.contiguous(memory_format=torch.channels_last)
    conditioning = Conditioning(x_hat, conditioning.z, conditioning.label)
    weights = guidance if isinstance(guidance, Guidance) else Guidance(condition=guidance)
    model: SamplerModel = GuidedDenoiser(denoiser, conditioning, weights, core.models.classifier)
    on_step: OnStep | None = None
    recorder: RecordingDenoiser | None = None
    if known is not None:
        x, mask = (part.to(core.device) for part in known)
        on_step = replace_known_pixels(
            denoiser.diffusion, denoiser.to_state(x, conditioning), mask, lambda i: normal(f"known pixels {i}")
        )
    elif estimates:
        steps = evenly_spaced(sampler_steps(core), estimates, endpoint=False)
        model = recorder = RecordingDenoiser(model, steps.tolist())
        on_step = recorder.on_step
    bf16 = core.config.precision.name == "bf16"
    with torch.autocast(core.device.type, torch.bfloat16, enabled=bf16):
        start = denoiser.diffusion.sample_prior(normal("x_T"))
        sampled = core.sampler.sample(model, start, lambda i: normal(f"sampler {i}"), on_step)

    def to_pixels(state: torch.Tensor) -> torch.Tensor:
        image = denoiser.to_image(state, conditioning)
        return core.decode(image) if core.models.latent_space else image

    recorded = [to_pixels(state) for state in recorder.x0] if recorder else []
    return to_pixels(sampled.u[:, : shapes.channels]), sampled.nfe, recorded


@torch.no_grad()
def refine_images(
    core: InferenceCore,
    conditioning: Conditioning,
    noise: KeyedNoise,
    *,
    guidance: Guidance | float = UNGUIDED,
    advance: ProgressCallback | None = None,
    known: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Refine any number of images, batch by batch, and set `core.nfe`.

    `known` = (images in [-1, 1], mask (n, 1, H, W)) keeps the pixels where the mask is true. `advance` is called with
    the number of finished images after each batch.

    Returns images (n, C, H, W), fp32, and their network evaluations (n,), both on the CPU. The images are in [-1, 1] if
    the sampler keeps them in this range.
    """
    # If each image takes its own number of steps, the last image may run alone. Every image runs alone then, so that
    # its bits do not depend on the others.
    size = CHUNK_SIZE if core.sampler.lockstep else 1
    images, evaluations = [], []
    with core.reproducible():
        for rows, count in core.network_batches(len(noise), size):
            kept = None if known is None else (known[0][rows], known[1][rows])
            refined, nfe, _ = refine_batch(core, conditioning[rows], noise[rows.tolist()], guidance, kept)
            images.append(refined[:count].cpu())
            evaluations.append(nfe[:count].cpu())
            if advance:
                advance(count)
    nfe = torch.cat(evaluations)
    core.nfe = mean_nfe(int(nfe.sum()), len(nfe))
    return torch.cat(images), nfe


@torch.no_grad()
def generate_batch(
    core: InferenceCore,
    numbers: range,
    seed: int,
    *,
    label: ClassLabels = None,
    guidance: Guidance | float = UNGUIDED,
    shared: SharedVariable | None = None,
    intermediate: int = 0,
) -> GeneratedImages:
    """Generate the images with these numbers in one batch.

    Args:
        core: the models and the sampler.
        numbers: one of the ranges of `chunk_ranges`.
        seed: seed of z and of the noise.
        label: one class for all images, or one for each of `numbers`.
        guidance: guidance weights.
        shared: what all images take from image 0 of the seed, if anything.
        intermediate: number of denoised estimates to return.

    Raises UserError as `check_generation`.
    """
    check_generation(core, shared, intermediate)
    zeros = [0] * len(numbers)
    with core.reproducible():
        conditioning = core.conditioning_of(zeros if shared is SharedVariable.z else numbers, seed, label)
        noise = KeyedNoise(seed, zeros if shared is SharedVariable.noise else numbers)
        refined, nfe, estimates = refine_batch(core, conditioning, noise, guidance, estimates=intermediate)
        vae = to_uint8(conditioning.x_hat).cpu() if core.models.has_generator else None
        stacked = torch.stack([to_uint8(each).cpu() for each in estimates], 1) if estimates else None
        classes = None if conditioning.label is None else conditioning.label.cpu()
        return GeneratedImages(vae, to_uint8(refined).cpu(), nfe.cpu(), classes, stacked)


def sampler_steps(core: InferenceCore) -> int:
    """Return the number of sampler steps. A schedule with discrete times limits it to the number of its times."""
    times, steps = core.models.denoiser.diffusion.schedule.steps, core.sampler.config.steps
    return min(steps, times or steps)


def check_generation(core: InferenceCore, shared: SharedVariable | None, intermediate: int) -> None:
    """Raise UserError if the run has no z to share, or if the sampler cannot give `intermediate` estimates."""
    if shared is not None and not core.models.has_generator:
        raise UserError(f"shared={shared.name}: this run draws no z besides its noise: leave shared out")
    if intermediate < 0:
        raise UserError(f"intermediate={intermediate}: use 0 (none) or more")
    if intermediate and not core.sampler.lockstep:
        raise UserError("intermediate images need a sampler that moves all in the same steps: use sampler=ddim or em")
    if intermediate > sampler_steps(core):
        raise UserError(f"intermediate={intermediate} is more than the {sampler_steps(core)} steps of the sampler")
