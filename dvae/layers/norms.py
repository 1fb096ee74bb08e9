"""Group normalisation (Wu & He 2018) with SiLU in the same step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

GROUPS = 32
"""Groups of channels, as in all published U-Nets of this family."""

TILE = 2**18
"""Numbers in a tile."""


class GroupNorm(nn.GroupNorm):
    """GroupNorm with statistics in fp32, optionally followed by SiLU: (B, C, H, W) to the same shape and dtype.

    `scale` and `shift` (B, C), where given, modulate the normalised map before SiLU: y * (1 + scale) + shift
    (adaptive group normalisation, Dhariwal & Nichol 2021).
    """

    def __init__(self, channels: int, silu: bool = False) -> None:
        super().__init__(GROUPS, channels)
        self.silu = silu

    def forward(
        self, x: torch.Tensor, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.silu and x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last):
            weight, bias = self.weight.expand(len(x), -1), self.bias.expand(len(x), -1)
            if scale is not None and shift is not None:
                weight, bias = weight * (1 + scale), bias * (1 + scale) + shift
            return GroupNormSiLU.apply(x, weight, bias, self.num_groups, self.eps)
        y = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)  # statistics are fp32 inside
        if scale is not None and shift is not None:
            y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return (F.silu(y) if self.silu else y).to(x.dtype)


class GroupNormSiLU(torch.autograd.Function):
    """silu(xhat * weight + bias) of a channels_last map on a CPU, where xhat is x normalised over groups of channels.

    There, bfloat16 GroupNorm is the slowest layer of a U-Net: PyTorch's kernel walks small maps with a stride, and a
    contiguous copy pays for two transpositions. This one takes the map as it lies in memory, as rows (B, H*W, C), where
    every sum and product runs along contiguous channels. Sums are fp32 (fp64 for fp64 maps).
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
    ) -> torch.Tensor:
        """x (B, C, H, W) in channels_last; weight and bias (B, C)."""
        rows = _rows(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        sums, squares = x.new_empty((2, *weight.shape), dtype=wide)
        for tile in _tiles(rows):
            work = rows[tile].to(wide, copy=True)
            torch.sum(work, 1, out=sums[tile])
            torch.sum(work.square_(), 1, out=squares[tile])
        mean, square = (_group_mean(s, groups, rows.shape[1]) for s in (sums, squares))
        rstd = torch.rsqrt((square - mean**2).clamp_min(0.0) + eps)
        weight = weight.to(wide)
        gain, offset = rstd * weight, bias.to(wide) - mean * rstd * weight
        y = torch.addcmul(offset[:, None].to(x.dtype), rows, gain[:, None].to(x.dtype))
        ctx.save_for_backward(rows, y, mean, rstd, weight)
        ctx.groups = groups
        return _map(F.silu(y), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, y, mean, rstd, weight = ctx.saved_tensors
        pixels = rows.shape[1]
        grad_rows = _rows(grad.contiguous(memory_format=torch.channels_last))
        dy, dbias, dweight = torch.empty_like(y), torch.empty_like(weight), torch.empty_like(weight)
        for tile in _tiles(rows):
            dy[tile] = torch.ops.aten.silu_backward(grad_rows[tile], y[tile])
            work = dy[tile].to(weight.dtype, copy=True)
            torch.sum(work, 1, out=dbias[tile])
            torch.sum(work.mul_(rows[tile].to(weight.dtype)), 1, out=dweight[tile])
        dweight = (dweight - mean * dbias) * rstd
        # dx = rstd * (weight * dy - mean(weight * dy) - xhat * mean(weight * dy * xhat)), the means over a group
        slope = -_group_mean(weight * dweight, ctx.groups, pixels) * rstd**2
        offset = -_group_mean(weight * dbias, ctx.groups, pixels) * rstd - slope * mean
        gain, slope, offset = ((c[:, None]).to(rows.dtype) for c in (rstd * weight, slope, offset))
        dx = torch.addcmul(offset, rows, slope).addcmul_(dy, gain)
        return _map(dx, grad), dweight, dbias, None, None


def _tiles(rows: torch.Tensor) -> list[slice]:
    """Slices of the batch whose fp32 copy stays in a core's cache."""
    step = max(1, TILE // rows[0].numel())
    return [slice(i, i + step) for i in range(0, len(rows), step)]


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) in channels_last to (B, H*W, C), a view."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _map(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B, H*W, C) to (B, C, H, W) in channels_last, a view."""
    return rows.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def _group_mean(sums: torch.Tensor, groups: int, pixels: int) -> torch.Tensor:
    """Sums over pixels (B, C) to the mean of each channel's group, (B, C)."""
    means = sums.unflatten(1, (groups, -1)).mean(2, keepdim=True) / pixels
    return means.expand(-1, -1, sums.shape[1] // groups).flatten(1)
