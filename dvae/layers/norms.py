"""Group normalization (Wu & He 2018), with the modulation and the SiLU that follow it in a U-Net."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

GROUPS = 32
"""Number of groups in the published U-Nets of this family. Each group should have at least two channels. If a group
has only one, a value that is added to the whole channel (a time, a latent) is part of the mean and is normalized away.
"""


def default_groups(channels: int) -> int:
    """Return the default number of groups: 32, or fewer so that each group has at least two channels."""
    return min(GROUPS, channels // 2)


class GroupNorm(nn.GroupNorm):
    """GroupNorm with fp32 statistics, optionally followed by SiLU: (B, C, H, W) to the same shape.

    If `scale` and `shift` (B, C) are given, the normalized map y becomes y * (1 + scale) + shift before SiLU (adaptive
    group normalization, Dhariwal & Nichol 2021). If `groups` is None or 0, `default_groups` applies.
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
        # On a CPU, the channels_last kernel reads small maps with a stride. Two transpositions and the contiguous
        # kernel take a fifth of its time.
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)
