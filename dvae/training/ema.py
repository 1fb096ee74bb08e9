"""AdamW that keeps a moving average of the weights as state beside its moments.

As optimiser state the average is partitioned, saved and resumed by DeepSpeed with everything else, and a step that is
skipped is skipped for it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from dvae.settings import EmaConfig, EmaProfile


def ema_decay(config: EmaConfig, step: int) -> float:
    """Weight of the past when step number `step` (from 1) has been taken."""
    if config.profile is EmaProfile.constant:
        return min(config.decay, (1 + step) / (10 + step))
    return (1.0 - 1.0 / step) ** (_gamma(config.width) + 1.0)


def _gamma(width: float) -> float:
    """Exponent of the power profile whose relative width is sigma_rel (Karras et al. 2024, eq. 126), by bisection.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), falling in gamma >= 0.
    """
    low, high = 0.0, 1e6
    for _ in range(200):
        gamma = (low + high) / 2
        if (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) > width**2:
            low = gamma
        else:
            high = gamma
    return (low + high) / 2


class AdamWEma(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019) with state "ema" per parameter; `ema_decay` is a param-group entry.

    `overflow`, set by the engine before a step, leaves that step out; DeepSpeed reads it after the step.
    """

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        for group in self.param_groups:
            group.setdefault("ema_decay", 0.0)
        self.overflow = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        if self.overflow:
            return
        super().step(closure)
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            averages = [self.state[p].setdefault("ema", p.detach().clone()) for p in weights]
            torch._foreach_lerp_(averages, weights, 1.0 - group["ema_decay"])
