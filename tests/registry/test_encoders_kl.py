"""simple_vae, kl_gan and diffusers_kl: sizes, objectives, and folders that do not fit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from dvae.errors import UserError
from dvae.registry.core import Shapes
from dvae.registry.encoders.base import ENCODERS, Encoder
from dvae.registry.encoders.diffusers_kl import CONFIG, WEIGHTS, DiffusersKL

KL_GAN = {"name": "kl_gan", "channels": [8, 8, 16], "groups": 4, "latent_channels": 2, "discriminator_layers": 2}
DIFFUSERS = {"name": "diffusers_kl", "block_out_channels": [8, 16], "norm_num_groups": 4, "scaling_factor": 0.5}
DESCRIBED = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "block_out_channels": [8, 16],
    "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4, "act_fn": "silu", "scaling_factor": 0.5,
}  # fmt: skip


def build(node: dict[str, object], image_size: int = 16, **fields: object) -> Encoder:
    torch.manual_seed(0)
    return ENCODERS.build({**node, **fields}, Shapes(image_size=image_size))


def images(count: int = 2, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_simple_vae_has_the_parameters_of_four_convolutions_and_three_linear_layers() -> None:
    widths, latent, flat = [3, 32, 64, 128, 256], 128, 256 * 2 * 2
    weights = sum(16 * a * b for a, b in pairwise(widths))
    biases = sum(widths[1:]) + sum(widths[:-1])
    linear = 3 * flat * latent + 2 * latent + flat
    vae = build({"name": "simple_vae"}, image_size=32)
    assert sum(p.numel() for p in vae.parameters()) == 2 * weights + biases + linear
    assert vae.latent_shape == (128,)


@pytest.mark.parametrize(
    ("node", "weight"), [({"name": "simple_vae", "channels": [8, 8]}, 0.25), (KL_GAN, 0.25)], ids=["simple", "kl_gan"]
)
def test_objective_is_squared_error_and_kl(node: dict[str, object], weight: float) -> None:
    vae, x = build(node, kl_weight=weight), images()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(0.7)  # so that no pixel of x_hat is clamped
    noise = torch.randn(2, *vae.latent_shape)
    terms, posterior = vae(x, noise), vae.encode(x)
    z = posterior.mean + torch.exp(0.5 * posterior.logvar) * noise
    x_hat = vae.decode(z)
    assert float(x_hat.detach().abs().max()) < 1
    torch.testing.assert_close(terms["reconstruction"], ((x - x_hat) / 2).square().sum((1, 2, 3)))
    kl = 0.5 * (posterior.mean**2 + posterior.logvar.exp() - 1 - posterior.logvar)
    torch.testing.assert_close(terms["kl"], kl.flatten(1).sum(1))
    torch.testing.assert_close(terms["loss"], terms["reconstruction"] + weight * terms["kl"])


def test_kl_gan_latent_is_a_map_and_images_are_clamped() -> None:
    vae = build(KL_GAN)
    assert vae.latent_shape == (2, 4, 4)
    with torch.no_grad():
        vae.autoencoder.last_layer.weight.mul_(1000)
        assert float(vae.decode(torch.randn(1, 2, 4, 4)).abs().max()) == 1
        assert float(vae(images(1), torch.randn(1, 2, 4, 4))["x_hat"].abs().max()) > 1


def test_kl_gan_discriminator_is_not_part_of_it() -> None:
    vae = build(KL_GAN)
    adversary = vae.adversary()
    assert adversary is not None
    assert not any("discriminator" in name for name in vae.state_dict())
    assert adversary.last_layer is vae.autoencoder.decoder.conv_out
    alone = build(KL_GAN, discriminator_weight=0.0)
    assert alone.adversary() is None
    assert alone(images(), torch.randn(2, *alone.latent_shape)).keys() == {"loss", "reconstruction", "kl", "z", "x_hat"}


@pytest.mark.parametrize(
    ("node", "size", "says"),
    [
        ({"name": "simple_vae"}, 24, "do not halve 4 times"),
        ({"name": "simple_vae", "channels": []}, 16, "at least one width"),
        ({**KL_GAN, "groups": 3}, 16, "3 groups of GroupNorm do not divide"),
        (KL_GAN, 18, "do not halve 2 times"),
        ({**KL_GAN, "kl_weight": -1.0}, 16, "kl_weight -1.0"),
        ({**KL_GAN, "discriminator_layers": 3}, 16, "leave no patch of images of 16 px"),
        ({**KL_GAN, "discriminator_width": 12}, 16, "multiple of 8"),
        ({**DIFFUSERS, "scaling_factor": 0.0}, 16, "scaling_factor 0.0 is not above 0"),
    ],
)
def test_refuses_in_one_line(node: dict[str, object], size: int, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        build(node, image_size=size)
    assert "\n" not in str(caught.value)


def write_folder(folder: Path, described: dict[str, object] | None = None) -> DiffusersKL:
    """A folder of random weights, and the encoder that they were taken from."""
    source = build(DIFFUSERS)
    assert isinstance(source, DiffusersKL)
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(DESCRIBED | (described or {})), encoding="utf-8")
    save_file(
        {name.removeprefix("autoencoder."): value for name, value in source.state_dict().items()}, folder / WEIGHTS
    )
    return source


def test_diffusers_folder_is_read(tmp_path: Path) -> None:
    source = write_folder(tmp_path)
    torch.manual_seed(7)
    other = ENCODERS.build({**DIFFUSERS, "folder": str(tmp_path)}, Shapes(image_size=16))
    state = other.pretrained()
    assert state is not None
    other.load_state_dict(state)
    x = images()
    assert torch.equal(other.encode(x).mean, source.encode(x).mean)
    z = torch.randn(2, *other.latent_shape)
    assert torch.equal(other.decode(z), source.decode(z))


def test_diffusers_latent_is_scaled_and_shifted() -> None:
    """z = 0.5 (w - 0.25) of the network's own latent w, and its standard deviation halved; decode goes back."""
    plain = build(DIFFUSERS, scaling_factor=1.0)
    scaled = build(DIFFUSERS, shift_factor=0.25)
    x = images()
    one, two = plain.encode(x), scaled.encode(x)
    torch.testing.assert_close(two.mean, 0.5 * (one.mean - 0.25))
    torch.testing.assert_close(torch.exp(0.5 * two.logvar), 0.5 * torch.exp(0.5 * one.logvar))
    torch.testing.assert_close(scaled.decode(two.mean), plain.decode(one.mean), rtol=1e-4, atol=1e-5)


def test_diffusers_names_of_attention_before_2023(tmp_path: Path) -> None:
    write_folder(tmp_path)
    wanted = build(DIFFUSERS, folder=str(tmp_path)).pretrained()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in load((tmp_path / WEIGHTS).read_bytes()).items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        renamed[name] = value
    save_file(renamed, tmp_path / WEIGHTS)
    assert any(".proj_attn." in name for name in renamed)
    got = build(DIFFUSERS, folder=str(tmp_path)).pretrained()
    assert wanted is not None
    assert got is not None
    assert wanted.keys() == got.keys()


@pytest.mark.parametrize(
    ("described", "says"),
    [
        ({"latent_channels": 16, "layers_per_block": 2}, "add encoder.layers_per_block=2 encoder.latent_channels=16"),
        ({"block_out_channels": [8, 8]}, r"add encoder.block_out_channels=\[8,8\]"),
        ({"use_quant_conv": False, "shift_factor": 0.1}, "encoder.use_quant_conv=false .*encoder.shift_factor=0.1"),
        ({"in_channels": 1}, "in_channels is 1, this encoder supports only 3"),
        ({"act_fn": "gelu"}, "act_fn is gelu, this encoder supports only silu"),
    ],
)
def test_another_network_is_refused_with_the_words_to_add(
    described: dict[str, object], says: str, tmp_path: Path
) -> None:
    write_folder(tmp_path, described)
    with pytest.raises(UserError, match=says) as caught:
        build(DIFFUSERS, folder=str(tmp_path)).pretrained()
    assert "\n" not in str(caught.value)


def test_unset_absent_truncated_and_surplus_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="folder is not set"):
        build(DIFFUSERS).pretrained()
    with pytest.raises(UserError, match=r"config\.json: not a readable"):
        build(DIFFUSERS, folder=str(tmp_path)).pretrained()
    write_folder(tmp_path)
    weights = tmp_path / WEIGHTS
    whole, tensors = weights.read_bytes(), load(weights.read_bytes())
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a readable weights file"):
        build(DIFFUSERS, folder=str(tmp_path)).pretrained()
    save_file(tensors | {"extra.weight": torch.zeros(1)}, weights)
    with pytest.raises(UserError, match=r"extra\.weight"):
        build(DIFFUSERS, folder=str(tmp_path)).pretrained()
    save_file(tensors | {"decoder.conv_out.bias": torch.zeros(4)}, weights)
    with pytest.raises(UserError, match=r"decoder\.conv_out\.bias"):
        build(DIFFUSERS, folder=str(tmp_path)).pretrained()


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "null", "[]", "3", '{"latent_channels": 4, "latent_channels": 8}', "[" * 100_000, "\xff",
        '{"block_out_channels": {"a": 1}}', '{"in_channels": [3]}', '{"scaling_factor": NaN}',
        '{"latent_channels": ' + "9" * 5000 + "}", '{"block_out_channels": [' + "1," * 9999 + "1]}",
    ],
)  # fmt: skip
def test_a_damaged_description_is_one_line(text: str, tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / CONFIG).write_text(text, encoding="latin-1")
    with pytest.raises(UserError) as caught:
        build(DIFFUSERS, folder=str(tmp_path)).pretrained()
    assert str(caught.value).startswith(f"{tmp_path / CONFIG}")
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 2000


def vast(path: Path) -> None:
    """A header that claims 2^60 numbers."""
    about = {"decoder.conv_in.weight": {"dtype": "F32", "shape": [2**30, 2**30], "data_offsets": [0, 2**62]}}
    header = json.dumps(about).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, Path.touch, vast])
def test_weights_that_are_none_are_one_line(make: Callable[[Path], None], tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    make(tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=r"not a readable weights file \(.*\)$") as caught:
        build(DIFFUSERS, folder=str(tmp_path)).pretrained()
    assert len(str(caught.value).splitlines()) == 1
