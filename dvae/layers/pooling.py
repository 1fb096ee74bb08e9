"""Attention pooling of a feature map into one vector."""

from __future__ import annotations

import torch
from torch import nn

from dvae.layers.attention import AttentionBackend, attention


class AttentionPool(nn.Module):
    """Pool a feature map (B, C, side, side) into (B, outputs). The mean pixel attends to itself and to every pixel.

    Radford et al. (2021), section 2.4. This is the head of the classifier of Dhariwal & Nichol (2021), with the same
    parameter names.
    """

    def __init__(self, channels: int, side: int, heads: int, outputs: int, backend: AttentionBackend) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.positional_embedding = nn.Parameter(torch.randn(channels, side**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixels = x.flatten(2)
        tokens = torch.cat([pixels.mean(2, keepdim=True), pixels], dim=2) + self.positional_embedding.to(x.dtype)
        # In the public checkpoints, the 3C channels of this layer have the order (qkv, heads, D).
        q, k, v = self.qkv_proj(tokens).transpose(1, 2).unflatten(2, (3, self.heads, -1)).unbind(2)
        pooled = attention(q[:, :1], k, v, self.backend).flatten(2)
        return self.c_proj(pooled.transpose(1, 2)).squeeze(2)
