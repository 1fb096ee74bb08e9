"""The two simple refiners: a U-Net without attention, and a ResNet at one resolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dvae.layers.blocks import AttentionBlock
from dvae.layers.embeddings import time_features
from dvae.registry.core import Shapes
from dvae.registry.refiners.base import REFINERS, NetworkCondition


def build(shapes: Shapes, **node: object) -> torch.nn.Module:
    torch.manual_seed(0)
    refiner = REFINERS.build(node, shapes)
    for parameter in refiner.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return refiner


def without_norms(refiner: torch.nn.Module) -> torch.nn.Module:
    """The refiner with SiLU alone where it normalizes, since norms let every pixel see all others."""
    for module in refiner.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = F.silu  # type: ignore[method-assign]
    return refiner


def test_simple_unet_is_convolutional_and_sees_the_whole_image():
    refiner = build(Shapes(image_size=32), name="simple_unet", width=32, multipliers=[1, 2, 4], blocks=1)
    assert not any(isinstance(module, AttentionBlock) for module in refiner.modules())
    u = torch.randn(1, 3, 32, 32, requires_grad=True)
    refiner(u, torch.ones(1), NetworkCondition())[0, 0, 16, 16].backward()
    assert (u.grad[0].abs().amax(0) > 0).all()


def test_simple_unet_at_one_level_and_at_four():
    for multipliers in ([1], [1, 2, 3, 2]):
        refiner = build(Shapes(image_size=8), name="simple_unet", width=32, multipliers=multipliers, blocks=2)
        assert refiner(torch.randn(1, 3, 8, 8), torch.ones(1), NetworkCondition()).shape == (1, 3, 8, 8)
        assert len(refiner.down) == len(refiner.up) + 1 == len(multipliers)


def test_flat_resnet_tells_its_blocks_constant_channels():
    shapes = Shapes(image_size=4, latent=(6,), condition_latent=True, labels=3)
    refiner = build(shapes, name="flat_resnet", width=32, blocks=1)
    z, t, label = torch.randn(2, 6), torch.tensor([3.0, 800.0]), torch.tensor([2, 3])
    told = refiner._condition_map(t, NetworkCondition(latent=z, label=label))[:, :, 0, 0]
    torch.testing.assert_close(told[:, :32], time_features(t, 16))
    assert told[:, 32:35].tolist() == [[0, 0, 1], [0, 0, 0]]  # the second is dropped
    assert torch.equal(told[:, 35:], z)

    block, h = refiner.blocks[0], torch.randn(2, 32, 4, 4)
    channels = told[:, :, None, None].expand(-1, -1, 4, 4)  # each as a channel, constant over the image
    both = torch.cat([F.silu(F.group_norm(h, 16, block.in_proj[0].weight, block.in_proj[0].bias)), channels], dim=1)
    kernel = torch.cat([block.in_proj[1].weight, F.pad(block.cond_proj.weight, (1, 1, 1, 1))], dim=1)
    inner = F.conv2d(both, kernel, block.in_proj[1].bias + block.cond_proj.bias, padding=1)
    torch.testing.assert_close(block(h, told[:, :, None, None]), h + block.out_proj(inner), rtol=1e-4, atol=1e-4)


def test_flat_resnet_stretches_a_latent_map_over_the_image():
    shapes = Shapes(image_size=8, latent=(4, 2, 2), condition_latent=True)
    refiner = without_norms(build(shapes, name="flat_resnet", width=32, blocks=1))
    u, t, z = torch.randn(1, 3, 8, 8), torch.ones(1), torch.randn(1, 4, 2, 2, requires_grad=True)
    output = refiner(u, t, NetworkCondition(latent=z))[0].square().sum(0)
    (grad,) = torch.autograd.grad(output[:2, :2].sum(), z, retain_graph=True)
    assert (grad[0].abs().amax(0) > 0).tolist() == [[True, False], [False, False]]
    (grad,) = torch.autograd.grad(output[6:, :2].sum(), z)
    assert (grad[0].abs().amax(0) > 0).tolist() == [[False, False], [True, False]]


def test_flat_resnet_sees_two_pixels_further_with_each_block():
    refiner = without_norms(build(Shapes(image_size=16), name="flat_resnet", width=32, blocks=2))
    u = torch.randn(1, 3, 16, 16, requires_grad=True)
    refiner(u, torch.ones(1), NetworkCondition())[0, 0, 8, 8].backward()
    rows = (u.grad[0].abs().sum((0, 2)) > 0).nonzero().flatten()
    assert (int(rows[0]), int(rows[-1])) == (8 - 6, 8 + 6)  # stem, two blocks of two, last convolution
