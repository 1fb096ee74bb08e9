"""AdamW that keeps moving averages of the weights (EMA) as optimizer state.

DeepSpeed partitions optimizer state, checkpoints hold it, and a skipped step does not change it. So all of this holds
for the averages, without further code.
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
"""Name of the optimizer state that holds the average which a run exports."""


@dataclass(frozen=True)
class EmaSpec:
    """Profile of one moving average: how much weight it gives to past weights."""

    profile: EmaProfile
    value: float
    """The decay of a constant profile, or the width (sigma_rel) of a power profile."""

    def decay(self, step: int) -> float:
        """Decay of the average at step number `step` (from 1): average = decay * average + (1 - decay) * weights.

        The power profile is from Karras et al. 2024, section 3.1.
        """
        if self.profile is EmaProfile.constant:
            # With the full decay from the start, the initial weights would stay in the average for very long.
            return min(self.value, (1 + step) / (10 + step))
        return (1.0 - 1.0 / step) ** (power_exponent(self.value) + 1.0)


def ema_specs(config: EmaConfig) -> dict[str, EmaSpec]:
    """All averages that the optimizer maintains, by the name of their state. The one that a run exports is first."""
    value = config.decay if config.profile is EmaProfile.constant else config.width
    extra = [EmaSpec(EmaProfile.power, width) for width in config.extra_widths]
    extra += [EmaSpec(EmaProfile.constant, decay) for decay in config.extra_decays]
    return {MAIN: EmaSpec(config.profile, value)} | {f"{MAIN}_{n}": spec for n, spec in enumerate(extra, 1)}


def ema_names(config: EmaConfig) -> list[str]:
    """Names of the optimizer states that are averages, MAIN first."""
    return list(ema_specs(config))


def ema_decays(config: EmaConfig, step: int) -> dict[str, float]:
    """Decay of each average at step number `step` (from 1), by name; see `EmaSpec.decay`."""
    return {name: spec.decay(step) for name, spec in ema_specs(config).items()}


@cache
def power_exponent(width: float) -> float:
    """Exponent gamma of the power profile with relative width sigma_rel (Karras et al. 2024, eq. 126), by bisection.

    It solves sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), whose right side decreases for gamma >= 0.
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
    """AdamW (Loshchilov & Hutter 2019) with averaged weights as additional state of each parameter.

    The param-group entry `ema_decays` maps the name of each average to its decay. The engine sets it before every step.

    The engine sets `overflow` before a step to skip that step. At ZeRO stage 0 DeepSpeed reads it after the step too,
    and counts the step as skipped.
    """

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        for group in self.param_groups:
            group.setdefault("ema_decays", {MAIN: 0.0})
        self.overflow = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update the weights, then the averages. Does nothing if `overflow` is set."""
        if self.overflow:
            return
        super().step(closure)
        for group in self.param_groups:
            # AdamW leaves a parameter without a gradient as it is. Its average then stays as it is, too.
            weights = [p for p in group["params"] if p.grad is not None]
            for name, decay in group["ema_decays"].items():
                for p in weights:
                    if name not in self.state[p]:
                        self.state[p][name] = p.detach().clone()
                # One call for all tensors is faster than a loop over them: average += (1 - decay) * (weight - average).
                torch._foreach_lerp_([self.state[p][name] for p in weights], weights, 1.0 - decay)
