"""Zero terminal SNR: a clock rescaled so that at t = 1 nothing is left of the data."""

from __future__ import annotations

import math

import torch


class ZeroTerminal:
    """The rule of Lin et al. 2024 (algorithm 1) for any clock: alpha' = (alpha - a1) / (1 - a1), alpha = exp(-B/2).

    a1 = alpha(1). They hold the first entry of their table fixed, here alpha(0) = 1 is: t = 0 stays clean. On DDPM's
    table B thereby differs from theirs by one constant, 6.4e-7. B' is infinite at t = 1.
    """

    def __init__(self, end: float) -> None:
        """end: B(1) of the clock that is rescaled, finite."""
        self._end = end
        self._a1 = math.exp(-0.5 * end)
        self._span = -math.expm1(-0.5 * end)  # 1 - a1

    def integral(self, B: torch.Tensor) -> torch.Tensor:
        """B' from B, by whichever of two equal forms keeps its digits: where alpha is near 1, and near a1."""
        early = -2.0 * torch.log1p(torch.expm1(-0.5 * B) / self._span)
        late = B - 2.0 * torch.log(self._left(B) / self._span)
        return torch.where(min(1.0, 0.5 * self._end) > B, early, late)

    def rate(self, B: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
        """dB'/dt = beta alpha / (alpha - a1), from B and beta = dB/dt."""
        return rate / self._left(B)

    def inverse(self, rescaled: torch.Tensor) -> torch.Tensor:
        """B from B'."""
        early = -2.0 * torch.log1p(self._span * torch.expm1(-0.5 * rescaled))
        late = -2.0 * torch.log(self._a1 + self._span * torch.exp(-0.5 * rescaled))
        return torch.where(rescaled < 1.0, early, late).clamp(max=self._end)

    def _left(self, B: torch.Tensor) -> torch.Tensor:
        """(alpha - a1) / alpha, in [0, 1): exactly 0 at the end."""
        return -torch.expm1(0.5 * (B - self._end))
