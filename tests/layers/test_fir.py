from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d

from dvae.layers.fir import downsample, fir_downsample, fir_filter, fir_upsample, upsample

TAPS = (1.0, 3.0, 3.0, 1.0)
FIR = np.outer(TAPS, TAPS) / 64.0
FORMATS = [torch.contiguous_format, torch.channels_last]


def directly(x: torch.Tensor, up: int, down: int, before: int, after: int) -> torch.Tensor:
    """Every map of x with zeros between pixels, padded, convolved with the whole 4x4 kernel, subsampled."""
    batch, channels, height, width = x.shape
    zeros = np.zeros((batch, channels, up * height, up * width))
    zeros[:, :, ::up, ::up] = x.detach().numpy()
    padded = np.pad(zeros, ((0, 0), (0, 0), (before, after), (before, after)))
    maps = [[convolve2d(m, up**2 * FIR, mode="valid")[::down, ::down] for m in sample] for sample in padded]
    return torch.from_numpy(np.array(maps))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_filtered_resampling_is_the_direct_convolution(memory_format):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64).contiguous(memory_format=memory_format)
    torch.testing.assert_close(fir_downsample(x), directly(x, up=1, down=2, before=1, after=1))
    torch.testing.assert_close(fir_upsample(x), directly(x, up=2, down=1, before=2, after=1))
    torch.testing.assert_close(fir_filter(x, TAPS, padding=2), directly(x, up=1, down=1, before=2, after=2))


def test_plain_resampling():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert downsample(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(downsample(upsample(x)), x)
    assert upsample(x)[0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_filter_keeps_constants_and_drops_the_finest_stripes():
    inner = (..., slice(1, -1), slice(1, -1))
    for change in (fir_downsample, fir_upsample):
        torch.testing.assert_close(change(torch.ones(1, 2, 8, 8))[inner], torch.ones(1, 2, 8, 8)[..., :1, :1].expand_as(
            change(torch.ones(1, 2, 8, 8))[inner]))  # fmt: skip
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 1, 8, 8)
    assert fir_downsample(stripes)[inner].abs().max() == 0


def test_is_exact_in_bf16():
    x = torch.randint(-4, 5, (1, 2, 8, 8)).float()
    for change in (fir_downsample, fir_upsample):
        assert torch.equal(change(x.bfloat16()).float(), change(x).bfloat16().float())


def test_gradients():
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fir_downsample, x)
    assert torch.autograd.gradcheck(fir_upsample, x)
