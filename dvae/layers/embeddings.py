"""Embeddings of scalars and vectors."""

from __future__ import annotations

import math

import torch
from torch import nn


def sinusoidal(t: torch.Tensor, width: int) -> torch.Tensor:
    """Return the sinusoidal embedding [cos(t f), sin(t f)] of t (B,), as (B, width), fp32. `width` must be even.

    The frequencies f fall geometrically from 1 to 1/10000 (Vaswani et al. 2017), so t should span about [0, 1000].
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


SMALLEST = 1e-5
"""Scale of the logarithm in `time_features`, as a fraction of [0, 1000]. Smaller times are hardly distinguished."""


def time_features(t_feature: torch.Tensor, width: int) -> torch.Tensor:
    """Return sinusoidal features of t_feature (B,) in [0, 1000] and of its logarithm, as (B, 2 * width), fp32.

    `width` must be even. The logarithm is needed because features of t alone hardly separate times t below 1/1000,
    at which a k = 2 process changes the most.
    """
    share = t_feature.float() / 1000.0
    log = torch.log1p(share / SMALLEST) / math.log1p(1.0 / SMALLEST)  # 0 at t = 0, 1 at t = 1
    return torch.cat([sinusoidal(t_feature, width), sinusoidal(1000.0 * log, width)], dim=1)


def mlp(inputs: int, width: int) -> nn.Sequential:
    """Return Linear, SiLU, Linear, which map (B, inputs) to (B, width)."""
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))


def grid_positions(side: int, width: int) -> torch.Tensor:
    """Return the sinusoidal position embedding of a side x side grid, row by row, as (side^2, width), fp32.

    The first half of an embedding encodes the column, the second half the row. Each half is [sin, cos] with
    frequencies from 1 down to 1/10000 (Vaswani et al. 2017 in two dimensions, as in MAE and DiT). `width` must be a
    multiple of 4.
    """
    quarter = width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    waves = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)  # (side, width / 2)
    columns = waves[None].expand(side, -1, -1)
    rows = waves[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).float()
