from __future__ import annotations

import pytest
import torch

from dvae.errors import UserError
from dvae.registry.core import Shapes
from dvae.registry.encoders.base import ENCODERS, Posterior
from dvae.registry.encoders.conv_vae import ConvVAE

SMALL = {
    "resolutions": [8, 4, 1],
    "channels": [8, 8, 16],
    "encoder_blocks": [1, 1, 1],
    "decoder_blocks": [1, 1, 1],
    "latent_dim": 5,
}


def small(image_size: int = 8, colors: int = 3, **fields: object) -> ConvVAE:
    torch.manual_seed(0)
    node = {"name": "conv_vae", **SMALL, **fields}
    return ENCODERS.build(node, Shapes(image_size=image_size, channels=colors))


def test_published_parameter_names():
    with torch.device("meta"):
        keys = ENCODERS.build({"name": "conv_vae"}, Shapes(image_size=32)).state_dict()
    assert keys["enc.in_conv.weight"].shape == (64, 3, 3, 3)
    assert "enc.in_conv.bias" not in keys
    assert keys["enc.block_mod.8.weight"].shape == (128, 64, 1, 1)  # after 32x7,32d2 comes 32t16
    assert keys["enc.block_mod.9.c2.weight"].shape == (64, 64, 3, 3)
    assert keys["dec.block_mod.0.c2.weight"].shape == (256, 256, 1, 1)  # no 3x3 at resolution 1
    assert keys["dec.block_mod.2.weight"].shape == (256, 512, 1, 1)  # 1x1, then 1u4 without parameters, then 1t4
    assert keys["enc.mu.weight"].shape == (512, 512, 1, 1)
    assert keys["dec.last_conv.bias"].shape == (3,)


def test_kl_known_answers():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    torch.testing.assert_close(Posterior(zero, zero).kl(), torch.zeros(2))
    torch.testing.assert_close(Posterior(one, zero).kl(), torch.full((2,), 1.5))
    torch.testing.assert_close(Posterior(zero, one).kl(), torch.full((2,), 1.5 * (torch.e - 2)))


def test_loss_counts_pixels_in_unit_range():
    vae = small(kl_weight=0.5)
    x, noise = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 5)
    terms = vae(x, noise)
    posterior = vae.encode(x)
    x_hat = vae.decode(posterior.sample(noise))
    torch.testing.assert_close(terms["reconstruction"], ((x - x_hat) / 2).square().sum((1, 2, 3)))
    torch.testing.assert_close(terms["kl"], posterior.kl())
    torch.testing.assert_close(terms["loss"], terms["reconstruction"] + 0.5 * terms["kl"])


def test_decodes_into_the_image_range():
    x_hat = small().decode(100 * torch.randn(16, 5))
    assert x_hat.abs().max() <= 1


@pytest.mark.parametrize(("size", "patch", "colors"), [(16, 2, 3), (8, 1, 1), (32, 4, 1)])
def test_patch_and_gray_images(size, patch, colors):
    vae = small(image_size=size, patch=patch, colors=colors)
    x = torch.rand(1, colors, size, size) * 2 - 1  # a batch of one
    assert vae.decode(vae.encode(x).mean).shape == x.shape
    assert vae.latent_shape == (5,)


def test_learns_one_image():
    vae = small()
    x, noise = torch.rand(1, 3, 8, 8) * 2 - 1, torch.zeros(1, 5)
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    before = vae(x, noise)["loss"].item()
    for _ in range(150):
        loss = vae(x, noise)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.4 * before


@pytest.mark.parametrize(
    ("fields", "size", "says"),
    [
        ({}, 16, "do not fit images of 16 px"),
        ({"resolutions": [8, 4, 2]}, 8, "end at 1"),
        ({"resolutions": [8, 3, 1]}, 8, "multiple of the next"),
        ({"channels": [8, 8]}, 8, "has 2 entries: give 3"),
        ({"decoder_blocks": [1, 1, 1, 1]}, 8, "has 4 entries: give 3"),
        ({"encoder_blocks": [1, 0, 1]}, 8, "at least one block"),
        ({"channels": [8, 7, 16]}, 8, "even channels"),
        ({"patch": 3}, 8, "patch 3 does not divide"),
        ({"kl_weight": -1.0}, 8, "kl_weight -1.0 is negative"),
    ],
)
def test_refuses_in_one_line(fields, size, says):
    with pytest.raises(UserError, match=says) as caught:
        small(image_size=size, **fields)
    assert "\n" not in str(caught.value)


def test_no_encoder_gives_nothing() -> None:
    encoder = ENCODERS.build({"name": "none"}, Shapes(image_size=8))
    x = torch.rand(3, 3, 8, 8) * 2 - 1
    posterior = encoder.encode(x)
    assert posterior.mean.shape == posterior.logvar.shape == (3, *encoder.latent_shape) == (3, 0)
    assert torch.equal(encoder.decode(posterior.sample(torch.empty(3, 0))), torch.zeros_like(x))
    assert torch.equal(posterior.kl(), torch.zeros(3))
    assert encoder.state_dict() == {}
    torch.testing.assert_close(encoder(x, torch.empty(3, 0))["loss"], x.square().sum((1, 2, 3)))
