"""The forward passes of a recipe's stages, for counting. They follow dvae/stages/ but compute no metrics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from dvae.diffusion.conditioning import Conditioning, NoiseSample
from dvae.layers.adversarial import discriminator_loss, generator_loss
from dvae.models.components import RunModels
from dvae.planning.counting import ForwardPass
from dvae.registry.encoders.base import Encoder


def place(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """Move a tensor to `device`; a 4-dimensional one gets the channels-last memory format."""
    tensor = tensor.to(device)
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def images(made: RunModels, batch: int) -> torch.Tensor:
    """Return zeros in place of the images of a micro-batch, (B, C, H, W)."""
    return torch.zeros(batch, made.shapes.channels, made.shapes.image_size, made.shapes.image_size)


def encoder_passes(made: RunModels) -> dict[str, ForwardPass]:
    """Return the forward pass of each module that the encoder stage trains: the encoder, and the discriminator if any.

    The modules are on the meta device.
    """
    encoder = made.encoder
    with torch.device("meta"):
        adversary = encoder.adversary()

    def draw(batch: int) -> tuple[Any, ...]:
        return images(made, batch), torch.zeros(batch, *encoder.latent_shape)

    def both(device: str, x: torch.Tensor, noise: torch.Tensor) -> tuple[Any, ...]:
        return place(x, device), place(noise, device)

    def loss(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return encoder(x, noise)["loss"].mean()

    if adversary is None:
        return {"encoder": ForwardPass(encoder, (), draw, both, loss)}
    judge = adversary.discriminator

    def judged(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        terms = encoder(x, noise)
        # Detach as GanTask does: it runs the discriminator's forward and backward pass separately from the encoder's.
        fake = terms["x_hat"].detach().requires_grad_()
        deceit = generator_loss(adversary.loss, judge(fake)).mean()
        return terms["loss"].mean() + adversary.distance(x, fake).mean() + deceit

    def told_apart(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        real, fake = judge(torch.cat([x, x])).chunk(2)
        return discriminator_loss(adversary.loss, real, fake).mean()

    return {
        "encoder": ForwardPass(encoder, (judge,), draw, both, judged),
        "discriminator": ForwardPass(judge, (), draw, both, told_apart),
    }


def refiner_pass(made: RunModels, encodes: bool, decodes: bool) -> ForwardPass:
    """Return the refiner's pass. `encodes` and `decodes` say whether the frozen encoder does so in every step."""
    denoiser = made.denoiser

    def loss(x: torch.Tensor, conditioning: Conditioning, noise_sample: NoiseSample) -> torch.Tensor:
        return denoiser(x, conditioning, noise_sample).mean()

    return _noisy_state_pass(made, denoiser, (), encodes, decodes, loss)


def classifier_pass(made: RunModels, encodes: bool, decodes: bool) -> ForwardPass:
    """Return the classifier's pass. It uses the denoiser only to add noise, and does not run the refiner network."""
    assert made.classifier is not None
    classifier, denoiser = made.classifier, made.denoiser

    def loss(x: torch.Tensor, conditioning: Conditioning, noise_sample: NoiseSample) -> torch.Tensor:
        with torch.no_grad():
            u = denoiser.add_noise(x, conditioning, noise_sample)
            feature = denoiser.diffusion.schedule.time_feature(noise_sample.t).to(u.device, torch.float32)
        logits = classifier(u, feature, denoiser.build_condition(conditioning))
        assert conditioning.label is not None
        return F.cross_entropy(logits, conditioning.label)

    return _noisy_state_pass(made, classifier, (denoiser,), encodes, decodes, loss)


def _noisy_state_pass(
    made: RunModels,
    trained: torch.nn.Module,
    beside: tuple[torch.nn.Module, ...],
    encodes: bool,
    decodes: bool,
    loss: Any,
) -> ForwardPass:
    """Return a pass over noisy states.

    `encodes` and `decodes` say whether the frozen encoder runs in every step, which depends on what is cached.
    """
    encoder = made.encoder.eval().requires_grad_(False)

    def draw(batch: int) -> tuple[Any, ...]:
        label = torch.zeros(batch, dtype=torch.int64) if made.shapes.labels else None
        noise = torch.zeros(batch, *encoder.latent_shape)
        return images(made, batch), noise, label, made.denoiser.sample_noise(0, torch.arange(batch))

    def prepare(
        device: str, x: torch.Tensor, noise: torch.Tensor, label: torch.Tensor | None, noise_sample: NoiseSample
    ) -> tuple[Any, ...]:
        x, z = place(x, device), place(noise, device)
        label = None if label is None else label.to(device)
        if encodes:
            z = encoder.encode(x).sample(z)
        aux_noise = None if noise_sample.aux_noise is None else place(noise_sample.aux_noise, device)
        noise_sample = replace(noise_sample, eps=place(noise_sample.eps, device), aux_noise=aux_noise)
        if made.latent_space:
            z = place(z.float(), device)
            return z, Conditioning.unconditional(z, label), noise_sample
        x_hat = _decoded(encoder, z, device) if decodes else torch.zeros_like(x)
        return x, Conditioning(x_hat, z.float(), label), noise_sample

    return ForwardPass(trained, (encoder, *beside), draw, prepare, loss)


def _decoded(encoder: Encoder, z: torch.Tensor, device: str) -> torch.Tensor:
    return place(encoder.decode(z).float(), device)
