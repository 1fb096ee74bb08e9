"""Zero terminal SNR: rescaling of a clock so that the state is pure noise at t = 1."""

from __future__ import annotations

import math

import torch


class ZeroTerminal:
    """Rescale any clock by the rule of Lin et al. 2024 (algorithm 1).

    alpha' = (alpha - a1) / (1 - a1), with alpha = exp(-B/2) and a1 = alpha(1). B' is infinite at t = 1. The paper's
    rule keeps the first entry of its table. Here alpha(0) = 1 is kept, so t = 0 stays clean. Because of this, B' on
    DDPM's table differs from the paper's by a constant, 6.4e-7.
    """

    def __init__(self, end: float) -> None:
        """Set the clock's end B(1), which must be finite."""
        self._end = end
        self._a1 = math.exp(-0.5 * end)
        self._span = -math.expm1(-0.5 * end)  # 1 - a1

    def integral(self, B: torch.Tensor) -> torch.Tensor:
        """Return B' for B.

        `early` and `late` are equal in exact arithmetic. `early` is accurate for alpha near 1, and `late` for alpha
        near a1.
        """
        early = -2.0 * torch.log1p(torch.expm1(-0.5 * B) / self._span)
        late = B - 2.0 * torch.log(self._left(B) / self._span)
        return torch.where(min(1.0, 0.5 * self._end) > B, early, late)

    def rate(self, B: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
        """Return dB'/dt = beta alpha / (alpha - a1), for B and `rate` = beta = dB/dt."""
        return rate / self._left(B)

    def inverse(self, rescaled: torch.Tensor) -> torch.Tensor:
        """Return B for B'."""
        early = -2.0 * torch.log1p(self._span * torch.expm1(-0.5 * rescaled))
        late = -2.0 * torch.log(self._a1 + self._span * torch.exp(-0.5 * rescaled))
        return torch.where(rescaled < 1.0, early, late).clamp(max=self._end)

    def _left(self, B: torch.Tensor) -> torch.Tensor:
        """Return (alpha - a1) / alpha, in [0, 1). It is exactly 0 at the end, where B' is infinite."""
        return -torch.expm1(0.5 * (B - self._end))
