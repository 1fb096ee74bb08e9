"""What is read off the shapes of published networks is what their presets say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tests_support import ROOT

from dvae.models.importers import diffusevae_layout, psld_layout
from dvae.models.importers.checkpoint_file import Checkpoint, CheckpointTensor
from dvae.models.importers.unpickle import TensorRef, TensorStorage
from dvae.registry.core import Shapes
from dvae.registry.encoders.base import ENCODERS
from dvae.registry.refiners.base import REFINERS

SIZES = {"cifar10": 32, "celeba64": 64, "celebamaskhq128": 128, "ffhq128": 128, "afhqv2": 128, "128": 128, "256": 256}
FILE = Checkpoint.__new__(Checkpoint)  # stands for a file, in messages alone
FILE.path = Path("file")


def presets(kind: str, start: str) -> list[str]:
    names = sorted(path.stem for path in (ROOT / "recipes" / kind).glob(f"{start}_*.yaml"))
    return [name for name in names if any(word in name for word in SIZES) and "ldm" not in name]


def preset(kind: str, name: str) -> tuple[dict, int]:
    """Settings of a preset, and the size of its images."""
    settings = OmegaConf.load(ROOT / "recipes" / kind / f"{name}.yaml")
    component = settings.pop("defaults")[0]
    size = next(size for word, size in SIZES.items() if word in name)
    plain = OmegaConf.to_container(settings)
    return {"name": component} | plain if component.islower() else plain, size


def stored(registry, node: dict, shapes: Shapes) -> tuple[dict[str, CheckpointTensor], object]:
    """The network's tensors as a file would hold them, and its settings."""
    with torch.device("meta"):
        made = registry.build(node, shapes)
    held = {}
    for name, value in made.state_dict().items():
        ref = TensorRef(TensorStorage(torch.float32, "0", value.numel()), 0, tuple(value.shape), value.stride())
        held[name] = CheckpointTensor(FILE, name, ref)
    return held, made.config


def agree(found: dict, kind: str, config: object, but: tuple[str, ...]) -> None:
    """All fields of the config were found, save those that no tensor shows, and as they are."""
    told = {key.removeprefix(f"{kind}."): value for key, value in found.items() if key.startswith(f"{kind}.")}
    fields = {name: getattr(config, name) for name in type(config).__dataclass_fields__ if name not in (*but, "name")}
    said = {name: getattr(value, "name", value) for name, value in fields.items()}
    assert told == said


@pytest.mark.parametrize("name", presets("refiner", "unet"))
@pytest.mark.parametrize("guided", [False, True])
def test_unet(name, guided):
    node, size = preset("refiner", name)
    latent = (512,) if guided else ()
    shapes = Shapes(image_size=size, condition_channels=3, latent=latent, condition_latent=guided)
    net, config = stored(REFINERS, node | {"scale_shift_norm": guided}, shapes)
    found = diffusevae_layout._unet(FILE, net, size)
    agree(found, "refiner", config, ("heads", "attention", "dropout", "checkpoint_blocks"))
    assert (found["denoiser.condition_latent"], found["denoiser.condition_image"], found["channels"]) == (
        guided,
        True,
        3,
    )


@pytest.mark.parametrize("name", presets("refiner", "ncsnpp"))
def test_ncsnpp(name):
    node, size = preset("refiner", name)
    net, config = stored(REFINERS, node, Shapes(image_size=size, k=2))
    recipe = {"image_size": size, "channels": 3, "process": {"name": "psld"}}
    found = psld_layout._settings(FILE, psld_layout._modules(FILE, net), recipe)
    hidden = ["attention", "dropout", "checkpoint_blocks", "time_scale", "fourier_scale", "patch"]
    assert found.pop("refiner.time_scale", None) == (1.0 if config.time.name == "positional" else None)
    agree(found, "refiner", config, tuple(hidden if config.progressive_input else [*hidden, "fir"]))


@pytest.mark.parametrize("name", presets("encoder", "conv_vae"))
def test_conv_vae(name):
    node, size = preset("encoder", name)
    net, config = stored(ENCODERS, node, Shapes(image_size=size))
    agree(diffusevae_layout._vae(FILE, net), "encoder", config, ("resolutions", "kl_weight"))


@pytest.mark.parametrize(
    ("preset_name", "encoder", "decoder"),
    [
        (
            "conv_vae_cifar10",
            "32x7,32d2,32t16,16x4,16d2,16t8,8x4,8d2,8t4,4x3,4d4,4t1,1x3",
            "1x1,1u4,1t4,4x2,4u2,4t8,8x3,8u2,8t16,16x7,16u2,16t32,32x15",
        ),
        (
            "conv_vae_256",
            "256x3,256d2,256t128,128x3,128d2,128t64,64x5,64d2,64t32,32x7,32d2,32t16,16x9,16d2,16t8,8x7,8d2,8t4,4x5,4d4,"
            "4t1,1x2",
            "1x2,1u4,1t4,4x4,4u2,4t8,8x6,8u2,8t16,16x8,16u2,16t32,32x5,32u2,32t64,64x4,64u2,64t128,128x2,128u2,128t256,"
            "256x2",
        ),
    ],
)
def test_published_block_strings_give_the_resolutions(preset_name, encoder, decoder, monkeypatch):
    node, size = preset("encoder", preset_name)
    net, config = stored(ENCODERS, node, Shapes(image_size=size))
    monkeypatch.setattr(Checkpoint, "settings", lambda self: {"enc_block_str": encoder, "dec_block_str": decoder})
    assert diffusevae_layout._resolutions(FILE, diffusevae_layout._vae(FILE, net)) == config.resolutions
