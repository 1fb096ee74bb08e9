from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dvae.layers.attention import AttentionBackend
from dvae.layers.fir import fir_downsample, upsample
from dvae.layers.ncsnpp_blocks import FirInputPyramid, InputPyramid, NCSNAttention, NCSNBlock

FORMATS = [torch.contiguous_format, torch.channels_last]


def moved(module: nn.Module) -> nn.Module:
    """The module in float64 with all its parameters random."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double()


@pytest.mark.parametrize("resample", [None, fir_downsample, upsample])
@pytest.mark.parametrize("outputs", [32, 64])
def test_block_is_the_formula(resample, outputs):
    block = moved(NCSNBlock(32, outputs, 8, 0.0, resample))
    x, embedding = torch.randn(2, 32, 4, 4).double(), torch.randn(2, 8).double()
    p = dict(block.named_parameters())
    change = resample or (lambda a: a)
    h = change(F.silu(F.group_norm(x, 8, p["GroupNorm_0.weight"], p["GroupNorm_0.bias"], 1e-6)))
    h = F.conv2d(h, p["Conv_0.weight"], p["Conv_0.bias"], padding=1)
    h = h + F.linear(F.silu(embedding), p["Dense_0.weight"], p["Dense_0.bias"])[:, :, None, None]
    h = F.silu(F.group_norm(h, outputs // 4, p["GroupNorm_1.weight"], p["GroupNorm_1.bias"], 1e-6))
    h = F.conv2d(h, p["Conv_1.weight"], p["Conv_1.bias"], padding=1)
    skip = change(x)
    assert ("Conv_2.weight" in p) == (resample is not None or outputs == 64)
    if "Conv_2.weight" in p:
        skip = F.conv2d(skip, p["Conv_2.weight"], p["Conv_2.bias"])
    torch.testing.assert_close(block(x, embedding), (skip + h) / 2**0.5)


def test_block_starts_as_its_rescaled_skip():
    x = torch.randn(2, 32, 4, 4)
    torch.testing.assert_close(NCSNBlock(32, 32, 8, 0.0)(x, torch.randn(2, 8)), x / 2**0.5)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("backend", [AttentionBackend.math, AttentionBackend.sdpa])
def test_attention_is_plain_math(memory_format, backend):
    block = moved(NCSNAttention(32, backend))
    x = torch.randn(2, 32, 3, 4).double().contiguous(memory_format=memory_format)
    p = dict(block.named_parameters())
    normed = F.group_norm(x, 8, p["GroupNorm_0.weight"], p["GroupNorm_0.bias"], 1e-6)
    for sample in range(2):
        pixels = normed[sample].reshape(32, 12).T  # (pixels, channels), row by row
        q, k, v = (pixels @ p[f"NIN_{i}.W"] + p[f"NIN_{i}.b"] for i in range(3))
        h = torch.softmax(q @ k.T / 32**0.5, dim=1) @ v @ p["NIN_3.W"] + p["NIN_3.b"]
        torch.testing.assert_close(block(x)[sample], (x[sample] + h.T.reshape(32, 3, 4)) / 2**0.5)


def test_input_pyramids_halve():
    x = torch.randn(1, 3, 8, 8).double()
    plain, fir_filter = moved(InputPyramid(3, 5)), moved(FirInputPyramid(3, 5))
    right_below = F.pad(x, (0, 1, 0, 1))
    torch.testing.assert_close(plain(x), F.conv2d(right_below, plain.Conv_0.weight, plain.Conv_0.bias, stride=2))
    weight = fir_filter.Conv2d_0.weight
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]).double()
    whole = F.conv2d(  # one 6x6 kernel: the convolution after the filter
        weight.flatten(0, 1)[:, None], torch.outer(taps, taps)[None, None] / 64, padding=3
    ).view(5, 3, 6, 6)  # fmt: skip
    torch.testing.assert_close(fir_filter(x), F.conv2d(x, whole, fir_filter.Conv2d_0.bias, stride=2, padding=2))
    assert fir_filter(x).shape == plain(x).shape == (1, 5, 4, 4)
