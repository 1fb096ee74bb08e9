"""Weights as small integers: errors of half a step at the most, and none where there need be none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dvae.models.quantization import codes

SHAPES = st.sampled_from([(1, 1), (3, 7), (5, 64), (4, 3, 3, 3), (8, 16, 1, 1)])


@given(SHAPES, st.integers(0, 2**32), st.floats(1e-6, 1e3))
def test_int8_is_off_by_half_a_step_of_its_channel(shape: tuple[int, ...], seed: int, size: float) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    stored, scales = codes.to_int8(weight)
    assert (stored.dtype, stored.shape, scales.dtype, scales.shape) == (
        torch.int8,
        weight.shape,
        torch.bfloat16,
        shape[:1],
    )
    back = codes.from_int8(stored, scales, torch.float64)
    step = scales.double().view(-1, *[1] * (len(shape) - 1))
    assert ((back - weight).abs() <= step / 2 * (1 + 1e-6)).all()
    # and the step is the smallest that reaches the largest weight, up to the rounding of bf16
    assert (scales.double() <= weight.flatten(1).abs().amax(1) / 127 * (1 + 2**-7)).all()


@given(SHAPES, st.integers(0, 2**32), st.sampled_from([2, 6, 32]))
def test_int4_is_off_by_half_a_step_of_its_group(shape: tuple[int, ...], seed: int, group: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    stored, scales = codes.to_int4(weight, group)
    inputs = weight[0].numel()
    size = codes.group_size(inputs, group)
    groups = -(-inputs // size)
    assert stored.dtype is torch.uint8
    assert stored.shape == (shape[0], groups * size // 2)
    assert scales.shape == (shape[0], groups)
    back = codes.from_int4(stored, scales, weight.shape, torch.float64)
    step = scales.double().repeat_interleave(size, 1)[:, :inputs].view(shape)
    assert ((back - weight).abs() <= step / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_what_can_be_represented_comes_back_exactly(bits: int) -> None:
    most = 2 ** (bits - 1) - 1
    numbers = torch.arange(-most, most + 1).float()
    weight = torch.stack([numbers * scale for scale in (0.5, 0.01220703125, 3.0)])  # scales that bf16 has
    for shape in (weight.shape, (3, len(numbers), 1, 1)):
        kernel = weight.view(shape)
        if bits == 8:
            back = codes.from_int8(*codes.to_int8(kernel), torch.float32)
        else:
            back = codes.from_int4(*codes.to_int4(kernel, 32), kernel.shape, torch.float32)
        assert torch.equal(back, kernel)


def test_a_channel_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 8)
    assert not codes.from_int8(*codes.to_int8(weight), torch.float32).any()
    assert not codes.from_int4(*codes.to_int4(weight, 4), weight.shape, torch.float32).any()


def test_nibbles_are_packed_low_first() -> None:
    stored, scales = codes.to_int4(torch.tensor([[7.0, -7.0, 0.0, 1.0]]), 4)
    assert scales.tolist() == [[1.0]]
    assert stored.tolist() == [[14 | 0 << 4, 7 | 8 << 4]]  # codes plus 7
