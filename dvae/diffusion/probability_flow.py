"""The probability-flow ODE in r = sqrt(B), the variable that it is integrated in.

Near the data D score goes like B^(-1/2), so u is smooth in r but not in B; nor in t, where the clock is a table and its
rate jumps.
"""

from __future__ import annotations

import torch

from dvae.diffusion.kernels import Diffusion
from dvae.diffusion.linalg import apply_matrix
from dvae.diffusion.rk45 import Velocity
from dvae.diffusion.sampler_model import SamplerModel, Threshold

MIN_SQRT_CLOCK = 1e-3
"""sqrt(B) below which nothing is integrated: there on a clock like edm t_min is as good as 0, where the score ends."""


def sqrt_clock(diffusion: Diffusion, t: float) -> float:
    """r = sqrt(B(t))."""
    return float(diffusion.elapsed(0.0, t).sqrt())


def flow_velocity(model: SamplerModel, threshold: Threshold = Threshold.none) -> Velocity:
    """du/dr = 2 r (A u - D score) of states u (n, k*C, H, W) at r (n,), for the samples `rows` of the model's batch."""
    diffusion = model.diffusion

    def velocity(u: torch.Tensor, r: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        t = diffusion.schedule.inverse(r**2).clamp(max=1.0)
        score = model[rows](u, t, threshold=threshold).score
        twice = 2.0 * r[:, None, None]
        return apply_matrix(twice * diffusion.A, u) - apply_matrix(twice * diffusion.D, score)

    return velocity
