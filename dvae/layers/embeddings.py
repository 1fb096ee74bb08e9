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


def mlp(inputs: int, width: int) -> nn.Sequential:
    """Linear, SiLU, Linear: (B, inputs) to (B, width)."""
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))
