"""Embeddings of scalars and vectors."""

from __future__ import annotations

import math

import torch
from torch import nn


def sinusoidal(t: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoidal embedding of t (B,), fp32: [cos(t f), sin(t f)], (B, width), `width` even.

    Frequencies f fall geometrically from 1 to 1/10000 (Vaswani et al. 2017), so t should span about [0, 1000].
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


SMALLEST = 1e-5
"""Share of [0, 1000] below which times look alike to `time_features`."""


def time_features(t_feature: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoidal features (B, 2 * width), fp32, of t_feature (B,) in [0, 1000] and of its logarithm; `width` even.

    Features of t alone barely separate times below a thousandth, where a k = 2 process does the most.
    """
    share = t_feature.float() / 1000.0
    log = torch.log1p(share / SMALLEST) / math.log1p(1.0 / SMALLEST)  # 0 at t = 0, 1 at t = 1
    return torch.cat([sinusoidal(t_feature, width), sinusoidal(1000.0 * log, width)], dim=1)


def mlp(inputs: int, width: int) -> nn.Sequential:
    """Linear, SiLU, Linear: (B, inputs) to (B, width)."""
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))


def grid_positions(side: int, width: int) -> torch.Tensor:
    """Sinusoidal embedding of the places of a side x side grid, row by row: (side^2, width), fp32; `width` % 4 == 0.

    The first half is of the column, the second of the row, each [sin, cos] with frequencies from 1 down to 1/10000
    (Vaswani et al. 2017 in two dimensions, as in MAE and DiT).
    """
    quarter = width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    waves = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)  # (side, width / 2)
    columns = waves[None].expand(side, -1, -1)
    rows = waves[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).float()
