"""AdamW that keeps moving averages of the weights as state beside its moments.

As optimizer state they are partitioned, saved and resumed with everything else, and a step that is skipped is skipped
for them too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from dvae.config.schema import EmaConfig, EmaProfile

MAIN = "ema"
"""State of the average that a run exports."""


@dataclass(frozen=True)
class EmaSpec:
    """The weight that one moving average gives to past weights."""

    profile: EmaProfile
    value: float
    """constant: the decay; power: the width (sigma_rel)."""

    def decay(self, step: int) -> float:
        """Weight of the past when step number `step` (from 1) has been taken; of power: Karras et al. 2024, §3.1."""
        if self.profile is EmaProfile.constant:
            return min(self.value, (1 + step) / (10 + step))
        return (1.0 - 1.0 / step) ** (power_exponent(self.value) + 1.0)


def ema_specs(config: EmaConfig) -> dict[str, EmaSpec]:
    """Every average that is maintained, by the name of its optimizer state. The one that a run exports is first."""
    value = config.decay if config.profile is EmaProfile.constant else config.width
    extra = [EmaSpec(EmaProfile.power, width) for width in config.extra_widths]
    extra += [EmaSpec(EmaProfile.constant, decay) for decay in config.extra_decays]
    return {MAIN: EmaSpec(config.profile, value)} | {f"{MAIN}_{n}": spec for n, spec in enumerate(extra, 1)}


def ema_names(config: EmaConfig) -> list[str]:
    """Names of the optimizer states that are averages, MAIN first."""
    return list(ema_specs(config))


def ema_decays(config: EmaConfig, step: int) -> dict[str, float]:
    """For each average the weight of the past when step number `step` (from 1) has been taken."""
    return {name: spec.decay(step) for name, spec in ema_specs(config).items()}


@cache
def power_exponent(width: float) -> float:
    """Exponent gamma of the power profile of relative width sigma_rel (Karras et al. 2024, eq. 126), by bisection.

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
    """AdamW (Loshchilov & Hutter 2019) with averages as further state of each parameter.

    The param-group entry `ema_decays` names them and gives each its weight of the past, before every step.
    `overflow`, set by the engine before a step, leaves that step out; DeepSpeed reads it after the step.
    """

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        for group in self.param_groups:
            group.setdefault("ema_decays", {MAIN: 0.0})
        self.overflow = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        if self.overflow:
            return
        super().step(closure)
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            for name, decay in group["ema_decays"].items():
                for p in weights:
                    if name not in self.state[p]:
                        self.state[p][name] = p.detach().clone()
                torch._foreach_lerp_([self.state[p][name] for p in weights], weights, 1.0 - decay)
