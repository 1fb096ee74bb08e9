"""Symmetric quantization of weights: int8 with a scale per output channel, int4 with a scale per group of inputs.

w ~ scale * code. The scales are rounded up to bf16 before the codes are computed. So no weight is clipped, and the
error of each weight is at most half a step (scale / 2).
"""

from __future__ import annotations

import torch

INT8 = 127
INT4 = 7
"""Largest code. The smallest code is its negative, so that zero is exact and no zero point is needed."""
SMALLEST = 1e-30
"""Smallest scale. It avoids a division by zero for channels that are all zero."""


def to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes (O, ...), int8; scales (O,), bf16) of a weight (O, ...), with one scale per output channel."""
    rows = weight.detach().float()
    scales = _rounded_up(rows.flatten(1).abs().amax(1) / INT8)
    codes = (rows / _column(scales, rows).float()).round().clamp(-INT8, INT8).to(torch.int8)
    return codes, scales


def from_int8(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the dequantized weight (O, ...) in `dtype`."""
    return codes.to(dtype).mul_(_column(scales, codes).to(dtype))


def to_int4(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes (O, bytes), uint8; scales (O, groups), bf16) of a weight (O, ...).

    One byte holds two codes. The weights of an output channel are flattened, and each `group` of them shares a scale.
    `group` must be even.
    """
    rows = weight.detach().float().flatten(1)
    group = group_size(rows.shape[1], group)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % group)).unflatten(1, (-1, group))
    scales = _rounded_up(rows.abs().amax(2) / INT4)
    codes = (rows / scales.float()[:, :, None]).round().clamp(-INT4, INT4).flatten(1) + INT4
    low, high = codes.to(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
    return low | high << 4, scales


def from_int4(codes: torch.Tensor, scales: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Return the dequantized weight of `shape` (O, ...) in `dtype`."""
    both = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1).to(dtype).sub_(INT4)
    rows = both.unflatten(1, (scales.shape[1], -1)).mul_(scales.to(dtype)[:, :, None]).flatten(1)
    return rows[:, : shape[1:].numel()].reshape(shape)


def group_size(inputs: int, group: int) -> int:
    """Return how many of `inputs` inputs share a scale: `group`, or all (as an even number) if there are fewer."""
    return min(group, inputs + inputs % 2)


def _column(scales: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return scales.view(-1, *[1] * (like.ndim - 1))


def _rounded_up(scales: torch.Tensor) -> torch.Tensor:
    """Round positive `scales` up to bf16: the smallest bf16 numbers that are not below them."""
    scales = scales.clamp(min=SMALLEST)
    nearest = scales.to(torch.bfloat16)
    # for a positive float, the next larger number has the next larger bit pattern
    next_up = (nearest.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(nearest.float() < scales, next_up, nearest)
