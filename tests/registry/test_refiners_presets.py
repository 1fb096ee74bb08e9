"""The networks of the papers at their real size, built without memory for their weights."""

from __future__ import annotations

import pytest
import torch
from tests_support import ROOT

from dvae.config import compose
from dvae.registry.classifiers.base import CLASSIFIERS
from dvae.registry.core import Shapes
from dvae.registry.refiners.base import REFINERS


def given_x_hat(size: int) -> Shapes:
    return Shapes(image_size=size, condition_channels=3)


def phase_space(size: int, k: int = 2) -> Shapes:
    return Shapes(image_size=size, k=k)


LATENTS = Shapes(image_size=32, channels=4, labels=1000)
PUBLISHED = {  # preset: (shapes, millions of parameters as published)
    "unet_cifar10": (given_x_hat(32), "34.4"),
    "unet_cifar10_attention": (given_x_hat(32), "35.7"),
    "unet_celeba64": (given_x_hat(64), "82.6"),
    "unet_celebamaskhq128": (given_x_hat(128), "95.2"),
    "unet_ffhq128": (given_x_hat(128), "87.9"),
    "unet_celebahq256": (given_x_hat(256), "113.7"),
    "unet_afhq256": (given_x_hat(256), "113.7"),
    "ncsnpp_cifar10_ablation": (phase_space(32), "39.40"),
    "ncsnpp_cifar10_best": (phase_space(32), "97.63"),
    "ncsnpp_celeba64": (phase_space(64), "62.8"),
    "ncsnpp_afhqv2_128": (phase_space(128), "65.8"),
    "ncsnpp_afhqv2_128_best": (phase_space(128), "128.5"),
    "dit_s": (LATENTS, "33"),
    "dit_b": (LATENTS, "130"),
    "dit_l": (LATENTS, "458"),
    "dit_xl": (LATENTS, "675"),
    "dit_l_pixels256": (given_x_hat(256), "457"),
    "unet_ldm_celeba256": (Shapes(image_size=64), "274"),
}


def millions(registry, node: object, shapes: Shapes, decimals: int) -> str:
    with torch.device("meta"):
        module = registry.build(node, shapes)
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.{decimals}f}"


@pytest.mark.parametrize("preset", PUBLISHED)
def test_refiner_has_its_published_size(preset):
    shapes, wanted = PUBLISHED[preset]
    node = compose.compose("train", [f"refiner={preset}"]).refiner
    assert millions(REFINERS, node, shapes, len(wanted.partition(".")[2])) == wanted


def test_every_preset_at_real_size_is_counted_here():
    found = {path.stem for path in (ROOT / "recipes" / "refiner").glob("*.yaml")}
    assert {name for name in found if not name.endswith(("_demo", "_mnist"))} == set(PUBLISHED)


def test_vp_has_the_network_of_psld_with_fewer_channels():
    node = compose.compose("train", ["refiner=ncsnpp_cifar10_ablation"]).refiner
    assert millions(REFINERS, node, phase_space(32, k=1), 1) == "39.4"


def test_latent_guidance_at_256_px():
    node = compose.compose("train", ["refiner=unet_celebahq256"]).refiner
    shapes = Shapes(image_size=256, condition_channels=3, latent=(1024,), condition_latent=True)
    assert millions(REFINERS, node, shapes, 2) == "114.46"


def test_classifier_has_its_published_size():
    node = compose.compose("train", ["classifier=ncsnpp_classifier_cifar10"]).classifier
    assert millions(CLASSIFIERS, node, Shapes(image_size=32, k=2, labels=10), 1) == "56.7"
