"""One batch of images refined: noise drawn, the sampler run, its end made an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dvae.diffusion.conditioning import Conditioning
from dvae.diffusion.guidance import Guidance, GuidedDenoiser
from dvae.diffusion.model import Model, OnStep
from dvae.diffusion.recording import RecordingDenoiser, spread
from dvae.errors import UserError
from dvae.inference import inpainting
from dvae.inference.noise import Noise, Shared

if TYPE_CHECKING:
    from dvae.inference.pipeline import Pipeline


def refine_batch(
    pipeline: Pipeline,
    conditioning: Conditioning,
    noise: Noise,
    guidance: Guidance | float,
    known: tuple[torch.Tensor, torch.Tensor] | None = None,
    estimates: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """(images (n, C, H, W) in [-1, 1], network evaluations of each (n,), so many denoised estimates on the way).

    `known` = (images in [-1, 1], mask (n, 1, H, W)) keeps the pixels where the mask is true; it goes without
    estimates.
    """
    denoiser, io = pipeline.models.denoiser, pipeline.models.denoiser.io
    shape = (io.k * io.channels, io.image_size, io.image_size)

    def normal(purpose: str) -> torch.Tensor:
        return noise.draw(purpose, shape).to(pipeline.device, memory_format=torch.channels_last)

    conditioning = Conditioning(
        conditioning.x_hat.contiguous(memory_format=torch.channels_last), conditioning.z, conditioning.label
    )
    weights = guidance if isinstance(guidance, Guidance) else Guidance(condition=guidance)
    model: Model = GuidedDenoiser(denoiser, conditioning, weights, pipeline.models.classifier)
    on_step: OnStep | None = None
    watched: RecordingDenoiser | None = None
    if known is not None:
        x, mask = (part.to(pipeline.device) for part in known)
        on_step = inpainting.keep_known(
            denoiser.diffusion, denoiser.to_state(x, conditioning), mask, lambda i: normal(f"known pixels {i}")
        )
    elif estimates:
        model = watched = RecordingDenoiser(model, spread(estimates, steps_of(pipeline)))
        on_step = watched.on_step
    bf16 = pipeline.config.precision.name == "bf16"
    with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=bf16):
        start = denoiser.diffusion.sample_prior(normal("x_T"))
        sampled = pipeline.sampler.sample(model, start, lambda i: normal(f"sampler {i}"), on_step)

    def shown(state: torch.Tensor) -> torch.Tensor:
        drawn = denoiser.to_image(state, conditioning)
        return pipeline.decode(drawn) if pipeline.models.latent_space else drawn

    on_the_way = [shown(state) for state in watched.x0] if watched else []
    return shown(sampled.u[:, : io.channels]), sampled.nfe, on_the_way


def steps_of(pipeline: Pipeline) -> int:
    """Steps of the sampler, on a schedule that may have fewer times."""
    times, steps = pipeline.models.denoiser.diffusion.schedule.steps, pipeline.sampler.config.steps
    return min(steps, times or steps)


def check_drawing(pipeline: Pipeline, shared: Shared | None, intermediate: int) -> None:
    """Raise UserError where images cannot share what they are to share, or there are no such estimates."""
    if shared is not None and not pipeline.models.has_generator:
        raise UserError(f"shared={shared.name}: this run draws no z besides its noise: leave shared out")
    if intermediate < 0:
        raise UserError(f"intermediate={intermediate}: use 0 (none) or more")
    if intermediate and not pipeline.sampler.lockstep:
        raise UserError("intermediate images need a sampler that moves all in the same steps: use sampler=ddim or em")
    if intermediate > steps_of(pipeline):
        raise UserError(f"intermediate={intermediate} is more than the {steps_of(pipeline)} steps of the sampler")
