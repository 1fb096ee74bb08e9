"""Weights as small integers: symmetric int8 per output channel, symmetric int4 per group of inputs.

w ~ scale * code. Scales are bf16 and rounded up, before the codes are made, so that no weight is clipped and the error
of each is half a step (scale / 2) at the most.
"""

from __future__ import annotations

import torch

INT8 = 127
INT4 = 7
"""Largest code; the smallest is its negative, so that zero is exact and the scale alone decides."""
SMALLEST = 1e-30
"""Least scale, for channels that are all zero."""


def to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes like weight (O, ...), int8; scales (O,), bf16) of a weight, one scale per output channel."""
    rows = weight.detach().float()
    scales = _rounded_up(rows.flatten(1).abs().amax(1) / INT8)
    codes = (rows / _column(scales, rows).float()).round().clamp(-INT8, INT8).to(torch.int8)
    return codes, scales


def from_int8(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight (O, ...) in `dtype`."""
    return codes.to(dtype).mul_(_column(scales, codes).to(dtype))


def to_int4(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes (O, bytes), uint8, two weights a byte; scales (O, groups), bf16), a scale per `group` inputs.

    The inputs of an output channel are those of all its pixels, one after the other. An even `group`.
    """
    rows = weight.detach().float().flatten(1)
    group = group_size(rows.shape[1], group)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % group)).unflatten(1, (-1, group))
    scales = _rounded_up(rows.abs().amax(2) / INT4)
    codes = (rows / scales.float()[:, :, None]).round().clamp(-INT4, INT4).flatten(1) + INT4
    low, high = codes.to(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
    return low | high << 4, scales


def from_int4(codes: torch.Tensor, scales: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """The weight of `shape` (O, ...) in `dtype`."""
    both = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1).to(dtype).sub_(INT4)
    rows = both.unflatten(1, (scales.shape[1], -1)).mul_(scales.to(dtype)[:, :, None]).flatten(1)
    return rows[:, : shape[1:].numel()].reshape(shape)


def group_size(inputs: int, group: int) -> int:
    """Inputs that share a scale in a layer of so many: `group`, or all of them where there are fewer."""
    return min(group, inputs + inputs % 2)


def _column(scales: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return scales.view(-1, *[1] * (like.ndim - 1))


def _rounded_up(scales: torch.Tensor) -> torch.Tensor:
    """The least bf16 numbers that are not below `scales` (positive)."""
    scales = scales.clamp(min=SMALLEST)
    nearest = scales.to(torch.bfloat16)
    next_up = (nearest.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(nearest.float() < scales, next_up, nearest)
