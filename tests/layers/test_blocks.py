from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dvae.layers.attention import AttentionBackend
from dvae.layers.blocks import AttentionBlock, ResBlock, Upsample
from dvae.layers.embeddings import sinusoidal
from dvae.layers.norms import GroupNorm

FORMATS = [torch.contiguous_format, torch.channels_last]


def norm(channels: int, silu: bool) -> GroupNorm:
    torch.manual_seed(0)
    module = GroupNorm(channels, silu=silu)
    torch.nn.init.normal_(module.weight)
    torch.nn.init.normal_(module.bias)
    return module


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("silu", [False, True])
def test_group_norm_is_the_definition(memory_format, silu):
    module = norm(64, silu).double()
    x = torch.randn(2, 64, 3, 5, dtype=torch.float64).contiguous(memory_format=memory_format)
    groups = x.reshape(2, 32, -1)
    centered = groups - groups.mean(2, keepdim=True)
    y = (centered / (centered.square().mean(2, keepdim=True) + module.eps).sqrt()).view_as(x)
    y = y * module.weight[:, None, None] + module.bias[:, None, None]
    got = module(x)
    torch.testing.assert_close(got, y * torch.sigmoid(y) if silu else y)
    assert got.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_group_norm_gradients(memory_format):
    module = norm(32, True).double()
    x = torch.randn(2, 32, 2, 2, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    scale, shift = (torch.randn(2, 32, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(module, (x, scale, shift))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_group_norm_statistics_are_fp32_in_bf16(memory_format):
    # 64 x 64 numbers around 8: sums kept in bf16 would stop at 2048
    module = GroupNorm(32)
    x = (8 + torch.randn(1, 32, 64, 64)).bfloat16().contiguous(memory_format=memory_format)
    got = module(x).float()
    torch.testing.assert_close(got, module(x.float()), rtol=0, atol=0.02)
    assert got.unflatten(1, (16, 2)).mean((2, 3, 4)).abs().max() < 2e-3


@pytest.mark.parametrize("channels", [4, 32, 64, 96])
def test_what_is_added_to_whole_channels_outlives_the_norm(channels):
    x, added = torch.randn(1, channels, 4, 4), torch.randn(1, channels, 1, 1)
    module = GroupNorm(channels)
    assert channels // module.num_groups >= 2
    assert (module(x + added) - module(x)).abs().mean() > 0.1


def test_scale_and_shift_modulate_before_silu():
    module, x = norm(32, True), torch.randn(2, 32, 4, 4)
    scale, shift = torch.randn(2, 32), torch.randn(2, 32)
    plain = F.group_norm(x, 16, module.weight, module.bias)
    wanted = F.silu(plain * (1 + scale[:, :, None, None]) + shift[:, :, None, None])
    torch.testing.assert_close(module(x, scale, shift), wanted)


def test_sinusoidal_known_answers():
    got = sinusoidal(torch.tensor([0.0, 2.0]), 4)
    torch.testing.assert_close(got[0], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(
        got[1], torch.tensor([math.cos(2.0), math.cos(0.02), math.sin(2.0), math.sin(0.02)]), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("scale_shift", [False, True])
def test_residual_block_starts_as_its_skip(scale_shift):
    x, embedding = torch.randn(2, 32, 4, 4), torch.randn(2, 8)
    block = ResBlock(32, 32, 8, 0.0, scale_shift)
    assert torch.equal(block(x, embedding), x)
    wider = ResBlock(32, 64, 8, 0.0, scale_shift)
    assert torch.equal(wider(x, embedding), wider.skip_connection(x))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_attention_block_orders_channels_as_heads_qkv(memory_format):
    torch.manual_seed(0)
    block = AttentionBlock(32, 2, AttentionBackend.math)
    torch.nn.init.normal_(block.proj_out.weight)
    x = torch.randn(1, 32, 2, 3).contiguous(memory_format=memory_format)
    pixels = block.norm(x).flatten(2)
    heads = []
    for head in block.qkv(pixels).split(48, dim=1):  # each head's q, k and v, 16 channels each
        q, k, v = head[0].split(16)
        heads.append(v @ torch.softmax(q.T @ k / 4.0, dim=1).T)
    wanted = x + block.proj_out(torch.cat(heads)[None]).view(1, 32, 2, 3)
    torch.testing.assert_close(block(x), wanted, rtol=1e-4, atol=1e-5)


def test_upsample_doubles():
    up = Upsample(32)
    assert up(torch.randn(1, 32, 3, 3)).shape == (1, 32, 6, 6)
