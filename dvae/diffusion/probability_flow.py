"""The probability-flow ODE as a function of r = sqrt(B), the variable of integration.

Near the data, D score is of order B^(-1/2). So u is smooth in r, but not in B. It is not smooth in t either if the
clock is a table, because its rate jumps between the entries.
"""

from __future__ import annotations

import torch

from dvae.diffusion.kernels import Diffusion
from dvae.diffusion.linalg import apply_matrix
from dvae.diffusion.rk45 import Velocity
from dvae.diffusion.sampler_model import SamplerModel, Threshold

MIN_SQRT_CLOCK = 1e-3
"""Smallest sqrt(B) at which the flow is integrated. On a clock such as edm, B is almost 0 at a small t_min, and the
score is not defined at B = 0."""


def sqrt_clock(diffusion: Diffusion, t: float) -> float:
    """Return r = sqrt(B(t))."""
    return float(diffusion.elapsed(0.0, t).sqrt())


def flow_velocity(model: SamplerModel, threshold: Threshold = Threshold.none) -> Velocity:
    """Build the right-hand side du/dr = 2 r (A u - D score) of the probability flow.

    The returned function takes states u (n, k*C, H, W), r (n,) float64, and `rows` (n,) int64, the indices of these
    samples in the model's batch. It returns du/dr in the shape of u.
    """
    diffusion = model.diffusion

    def velocity(u: torch.Tensor, r: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        t = diffusion.schedule.inverse(r**2).clamp(max=1.0)  # rounding can give a t just above 1
        score = model[rows](u, t, threshold=threshold).score
        twice = 2.0 * r[:, None, None]
        return apply_matrix(twice * diffusion.A, u) - apply_matrix(twice * diffusion.D, score)

    return velocity
