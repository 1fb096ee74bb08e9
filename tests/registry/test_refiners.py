from __future__ import annotations

import pytest
import torch

from dvae.errors import UserError
from dvae.registry.core import Shapes
from dvae.registry.refiners.base import REFINERS, NetworkCondition
from dvae.registry.refiners.unet import UNet

# The authors compare their list [16] with the downsampling factor, so attention is at image_size / 16 where the net
# goes that far down, and in the middle block.
PUBLISHED = {  # name: (image size, multipliers, attention resolutions, latent width or 0, millions of parameters)
    "cifar10": (32, [1, 2, 2, 2], [], 0, 34.4),
    "cifar10, attention at 16 px": (32, [1, 2, 2, 2], [16], 0, 35.7),
    "celeba64": (64, [1, 2, 2, 2, 4], [4], 0, 82.6),
    "celebamaskhq128": (128, [1, 2, 2, 3, 4], [8], 0, 95.2),
    "ffhq128": (128, [1, 1, 2, 3, 4], [8], 0, 87.9),
    "celebahq256": (256, [1, 1, 2, 2, 4, 4], [16], 0, 113.68),
    "celebahq256, latent guidance": (256, [1, 1, 2, 2, 4, 4], [16], 1024, 114.46),
}
SMALL = {"width": 32, "multipliers": [1, 2], "blocks": 1, "attention_resolutions": []}


def small(shapes: Shapes, seed: int = 0, **fields: object) -> UNet:
    """A small net whose zero-initialized layers are moved off zero."""
    torch.manual_seed(seed)
    unet = REFINERS.build({"name": "unet", **SMALL, **fields}, shapes)
    with torch.no_grad():
        for parameter in unet.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return unet


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    size, multipliers, attention, latent, millions = PUBLISHED[name]
    shapes = Shapes(
        image_size=size, condition_channels=3, latent=(latent,) if latent else (), condition_latent=latent > 0
    )
    node = {"name": "unet", "multipliers": multipliers, "attention_resolutions": attention, "heads": 8}
    with torch.device("meta"):
        unet = REFINERS.build(node, shapes)
    decimals = len(str(millions).split(".")[1])
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6, decimals) == millions


def test_parameter_names_of_the_public_checkpoints():
    shapes = Shapes(image_size=32, condition_channels=3, latent=(512,), condition_latent=True)
    with torch.device("meta"):
        keys = REFINERS.build({"name": "unet", "attention_resolutions": [16]}, shapes).state_dict()
    shapes = {
        "time_embed.0.weight": (512, 128),
        "time_embed.2.bias": (512,),
        "proj.0.weight": (512, 512),
        "input_blocks.0.0.weight": (128, 6, 3, 3),
        "input_blocks.1.0.in_layers.0.weight": (128,),
        "input_blocks.1.0.in_layers.2.weight": (128, 128, 3, 3),
        "input_blocks.1.0.emb_layers.1.weight": (128, 512),
        "input_blocks.1.0.out_layers.0.bias": (128,),
        "input_blocks.1.0.out_layers.3.weight": (128, 128, 3, 3),
        "input_blocks.3.0.op.weight": (128, 128, 3, 3),
        "input_blocks.4.0.skip_connection.weight": (256, 128, 1, 1),
        "input_blocks.4.1.norm.weight": (256,),
        "input_blocks.4.1.qkv.weight": (768, 256, 1),
        "input_blocks.4.1.proj_out.weight": (256, 256, 1),
        "middle_block.1.qkv.bias": (768,),
        "middle_block.2.out_layers.3.bias": (256,),
        "output_blocks.0.0.in_layers.2.weight": (256, 512, 3, 3),
        "output_blocks.2.1.conv.weight": (256, 256, 3, 3),
        "output_blocks.8.2.conv.weight": (256, 256, 3, 3),
        "output_blocks.11.0.in_layers.0.weight": (256,),
        "out.0.weight": (128,),
        "out.2.weight": (3, 128, 3, 3),
    }
    assert {key: tuple(keys[key].shape) for key in shapes} == shapes


def test_starts_at_zero():
    unet = REFINERS.build({"name": "unet", **SMALL}, Shapes(image_size=8))
    assert not unet(torch.randn(2, 3, 8, 8), torch.tensor([0.0, 999.0]), NetworkCondition()).any()


@pytest.mark.parametrize("scale_shift_norm", [False, True])
def test_every_condition_is_heard(scale_shift_norm):
    shapes = Shapes(image_size=8, condition_channels=3, latent=(2, 2), condition_latent=True, labels=4)
    unet = small(shapes, scale_shift_norm=scale_shift_norm)
    u, t = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 500.0])
    image, latent, label = torch.randn(2, 3, 8, 8), torch.randn(2, 2, 2), torch.tensor([0, 4])
    base = unet(u, t, NetworkCondition(image, latent, label))
    others = [
        unet(u, t + 50, NetworkCondition(image, latent, label)),
        unet(u, t, NetworkCondition(image + 1, latent, label)),
        unet(u, t, NetworkCondition(image, latent + 1, label)),
        unet(u, t, NetworkCondition(image, latent, torch.tensor([1, 1]))),
    ]
    for other in others:
        assert (other - base).abs().amax(dim=(1, 2, 3)).min() > 1e-4  # heard by each sample


def test_samples_do_not_mix():
    unet = small(Shapes(image_size=8))
    u, t = torch.randn(3, 3, 8, 8), torch.tensor([1.0, 20.0, 300.0])
    alone = torch.cat([unet(u[i : i + 1], t[i : i + 1], NetworkCondition()) for i in range(3)])
    torch.testing.assert_close(unet(u, t, NetworkCondition()), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patch_keeps_the_shape(patch):
    unet = small(Shapes(image_size=16, k=2, channels=1, condition_channels=1), patch=patch)
    u = torch.randn(1, 2, 16, 16)
    assert unet(u, torch.zeros(1), NetworkCondition(image=torch.randn(1, 1, 16, 16))).shape == u.shape


@pytest.mark.parametrize("multipliers", [[1], [2, 1], [1, 3, 2]])
def test_any_multipliers(multipliers):
    unet = small(Shapes(image_size=8), multipliers=multipliers, attention_resolutions=[8], heads=4, blocks=2)
    assert unet(torch.randn(1, 3, 8, 8), torch.zeros(1), NetworkCondition()).shape == (1, 3, 8, 8)


def test_a_missing_condition_is_named():
    unet = small(Shapes(image_size=8, latent=(4,), condition_latent=True))
    with pytest.raises(ValueError, match=r"condition\.latent"):
        unet(torch.randn(1, 3, 8, 8), torch.zeros(1), NetworkCondition())


def test_dropout_is_plain():
    unet = small(Shapes(image_size=8), dropout=0.5)
    u, t = torch.randn(2, 3, 8, 8), torch.zeros(2)
    assert not torch.equal(unet(u, t, NetworkCondition()), unet(u, t, NetworkCondition()))
    unet.eval()
    assert torch.equal(unet(u, t, NetworkCondition()), unet(u, t, NetworkCondition()))
    assert {m.p for m in unet.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}


@pytest.mark.parametrize(
    ("fields", "shapes", "says"),
    [
        ({"width": 48}, Shapes(image_size=8), "48 is not a multiple of 32"),
        ({"multipliers": [1, 1, 1, 1, 1]}, Shapes(image_size=8), "8 px do not halve 4 times"),
        ({"patch": 3}, Shapes(image_size=8), "do not halve"),
        ({"patch": 0}, Shapes(image_size=8), "do not halve"),
        ({"attention_resolutions": [16]}, Shapes(image_size=8), r"\[16\] do not occur: the feature maps are \[8, 4\]"),
        ({"heads": 5}, Shapes(image_size=8), "heads 5 does not divide 32"),
        ({"groups": 5}, Shapes(image_size=8), "refiner.groups 5 does not divide refiner.width 32"),
        ({"groups": -1}, Shapes(image_size=8), "refiner.groups -1 does not divide"),
        ({"blocks": 0}, Shapes(image_size=8), "at least one level"),
        ({"dropout": 1.0}, Shapes(image_size=8), "dropout 1.0"),
        ({}, Shapes(image_size=8, condition_latent=True), "needs a latent shape"),
    ],
)
def test_refuses_in_one_line(fields, shapes, says):
    with pytest.raises(UserError, match=says) as caught:
        small(shapes, **fields)
    assert "\n" not in str(caught.value)
