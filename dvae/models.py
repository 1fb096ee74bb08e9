"""The components of a run, built from its config."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from dvae.config import RunConfig
from dvae.denoiser import Denoiser
from dvae.diffusion import Diffusion
from dvae.errors import UserError
from dvae.registry import ENCODERS, PRIORS, PROCESSES, REFINERS, SAMPLERS, SCHEDULES, Shapes
from dvae.registry.encoders import Encoder
from dvae.registry.priors import Prior
from dvae.registry.samplers import Sampler


@dataclass(frozen=True)
class Models:
    """Encoder, prior, denoiser (refiner + diffusion) and sampler, with the shapes they agree on."""

    encoder: Encoder
    prior: Prior
    denoiser: Denoiser
    sampler: Sampler
    io: Shapes

    def trained(self) -> dict[str, nn.Module]:
        """The parts that hold weights, by the name they have in a bundle."""
        return {"encoder": self.encoder, "prior": self.prior, "denoiser": self.denoiser}

    def parameters(self) -> dict[str, int]:
        """Parameter counts of encoder and refiner."""
        return {
            "encoder": sum(p.numel() for p in self.encoder.parameters()),
            "refiner": sum(p.numel() for p in self.denoiser.parameters()),
        }


def build(config: RunConfig, seed_weights: bool = True) -> Models:
    """All components of `config`. Raises UserError where they do not fit each other.

    Initial weights are keyed by the run's seed, so that they do not depend on what was built before.
    """
    io = Shapes(image_size=config.image_size, channels=config.channels)
    with torch.random.fork_rng(devices=[], enabled=seed_weights):
        torch.manual_seed(config.seed)
        encoder = ENCODERS.build(config.encoder, io)
        process = PROCESSES.build(config.process, io)
        io = replace(
            io,
            latent=encoder.latent_shape,
            k=process.k,
            condition_channels=config.channels if config.denoiser.condition_image else 0,
            condition_latent=config.denoiser.condition_latent,
        )
        prior = PRIORS.build(config.prior, io)
        refiner = REFINERS.build(config.refiner, io)
        diffusion = Diffusion(process, SCHEDULES.build(config.schedule, io))
        denoiser = Denoiser(refiner, diffusion, config.denoiser, io)
    return Models(encoder, prior, denoiser, build_sampler(config.sampler, denoiser.diffusion, io), io)


def build_sampler(node: object, diffusion: Diffusion, io: Shapes) -> Sampler:
    """The sampler of `node`. Raises UserError, naming those that can, where it does not integrate the process."""
    sampler = SAMPLERS.build(node, io)
    if not sampler.supports(diffusion):
        name = SAMPLERS.config(node).name
        process = type(diffusion.process).__name__.lower()
        able = [other for other in SAMPLERS.names() if SAMPLERS.build({"name": other}, io).supports(diffusion)]
        raise UserError(f"sampler={name} does not integrate process {process}: use one of {', '.join(able)}")
    return sampler


def on_meta(config: RunConfig) -> Models:
    """The components without memory for their weights: to check that they fit, and to count parameters."""
    with torch.device("meta"):
        return build(config, seed_weights=False)
