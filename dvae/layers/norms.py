"""Group normalization (Wu & He 2018), with what follows it in a U-Net."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

GROUPS = 32
"""Groups of channels, as in the published U-Nets of this family, which have two channels or more in each: in a group of
one, what is added to a whole channel (a time, a latent) is its mean, and normalized away."""


def default_groups(channels: int) -> int:
    """Groups that `channels` are normalized in if nothing else is asked for: 32, or fewer to have two in each."""
    return min(GROUPS, channels // 2)


class GroupNorm(nn.GroupNorm):
    """GroupNorm with fp32 statistics, optionally followed by SiLU: (B, C, H, W) to the same shape.

    `scale` and `shift` (B, C), where given, modulate the normalized map before SiLU: y * (1 + scale) + shift
    (adaptive group normalization, Dhariwal & Nichol 2021). `groups` None or 0: `default_groups`.
    """

    def __init__(self, channels: int, silu: bool = False, groups: int | None = None, eps: float = 1e-5) -> None:
        super().__init__(groups or default_groups(channels), channels, eps)
        self.silu = silu

    def forward(
        self, x: torch.Tensor, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        y = self._normalize(x)
        if scale is not None and shift is not None:
            y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return F.silu(y) if self.silu else y

    def _normalize(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or x.is_contiguous():
            return super().forward(x)
        # on a CPU the channels_last kernel walks small maps with a stride: two transpositions cost a fifth of that
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)
