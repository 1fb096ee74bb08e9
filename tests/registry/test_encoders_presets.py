"""The autoencoders of the papers at their real size, built without memory for their weights."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tests_support import ROOT
from torch import nn

from dvae.config import compose
from dvae.registry.core import Shapes
from dvae.registry.encoders.base import ENCODERS, Encoder

DIFFUSEVAE = {  # preset: (image size, latent length, millions in encoder and decoder as published)
    "conv_vae_cifar10": (32, 512, "5.8", "3.4"),
    "conv_vae_celeba64": (64, 512, "8.0", "6.0"),
    "conv_vae_128": (128, 1024, "14.4", "6.7"),
    "conv_vae_256": (256, 1024, "19.5", "13.2"),
}
LATENT_DIFFUSION = {  # preset: (latent of 256 px, millions)
    "kl_gan_f4": ((3, 64, 64), "55.3"),
    "kl_gan_f8": ((4, 32, 32), "83.7"),
    "stable_diffusion_vae": ((4, 32, 32), "83.7"),
}


def preset(name: str, image_size: int) -> Encoder:
    with torch.device("meta"):
        return ENCODERS.build(compose.compose("train", [f"encoder={name}"]).encoder, Shapes(image_size=image_size))


def millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f}"


@pytest.mark.parametrize("name", DIFFUSEVAE)
def test_diffusevae_sizes(name: str) -> None:
    size, latent, encoder, decoder = DIFFUSEVAE[name]
    vae = preset(name, size)
    assert (millions(vae.enc), millions(vae.dec)) == (encoder, decoder)
    assert vae.latent_shape == (latent,)
    assert isinstance(vae.dec.in_conv, nn.Identity)  # the published decoders take z as it is


@pytest.mark.parametrize("name", LATENT_DIFFUSION)
def test_latent_diffusion_sizes(name: str) -> None:
    latent, wanted = LATENT_DIFFUSION[name]
    vae = preset(name, 256)
    assert vae.latent_shape == latent
    assert millions(vae) == wanted


def test_stable_diffusion_to_the_last_parameter() -> None:
    """83,653,863, as diffusers counts its AutoencoderKL of these fields."""
    assert sum(p.numel() for p in preset("stable_diffusion_vae", 512).parameters()) == 83_653_863


def test_discriminator_is_that_of_pix2pix() -> None:
    """3 -> 64 -> 128 -> 256 -> 512 -> 1 by 4x4 kernels: 2.8M, and logits for patches of 70 px."""
    with torch.device("meta"):
        adversary = preset("kl_gan_f8", 256).adversary()
    assert adversary is not None
    widths = [3, 64, 128, 256, 512, 1]
    kernels = sum(16 * a * b for a, b in pairwise(widths))
    biases = 64 + 1 + 2 * (128 + 256 + 512)  # first and last layer; scale and shift of the norms between
    assert sum(p.numel() for p in adversary.discriminator.parameters()) == kernels + biases
    with torch.device("meta"):
        assert adversary.discriminator(torch.empty(1, 3, 256, 256)).shape == (1, 1, 30, 30)


def test_every_preset_at_real_size_is_counted_here() -> None:
    found = {path.stem for path in (ROOT / "recipes" / "encoder").glob("*.yaml")}
    assert {name for name in found if not name.endswith("_demo")} == {*DIFFUSEVAE, *LATENT_DIFFUSION}
