"""UniPC, the unified predictor-corrector method."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import hyp1f1

from dvae.diffusion.kernels import Diffusion
from dvae.errors import UserError
from dvae.registry.core import Shapes
from dvae.registry.samplers.base import SAMPLERS, Sampler, SamplerState


@SAMPLERS.register("unipc")
class UniPC(Sampler):
    """Unified predictor-corrector, multistep, for predictions of x0, with B(h) = e^h - 1 (Zhao et al. 2023, section 3).

    With lambda = log(alpha/sigma), the exact flow from t to s is u_s = sigma_s / sigma_t u_t + alpha_s times the
    integral of e^(lambda - lambda_s) x0. The predictor replaces x0 by the polynomial through the last `order`
    predictions. The next step calls the model at s anyway, which gives one more point of x0. The corrector then adds
    the change of u_s that this point makes. So the method needs one model call per step and has order `order` + 1.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Sampler.Config):
        order: int = 2
        """Number of predictions in the polynomial, 1 to 3. The first steps have fewer."""

    config: Config

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        if config.order not in (1, 2, 3):
            raise UserError(f"sampler.order={config.order}: must be 1, 2 or 3")

    def supports(self, diffusion: Diffusion) -> bool:
        return diffusion.k == 1

    def step(self, state: SamplerState, u: torch.Tensor, t: float, s: float) -> torch.Tensor:
        diffusion, x0 = state.diffusion, state.predict(u, t).x0
        now, then = diffusion.log_snr(t).item(), diffusion.log_snr(s).item()
        if state.history:  # the corrector adds to u, so changes that on_step made to u are kept
            u = u + diffusion.alpha(t).item() * (curvature(state.history, now, x0) - curvature(state.history, now))
        state.history = [*state.history, (now, x0)][-self.config.order :]
        bent = x0 * -math.expm1(now - then) + curvature(state.history, then)
        return diffusion.sigma(s).item() / diffusion.sigma(t).item() * u + diffusion.alpha(s).item() * bent


def curvature(
    history: list[tuple[float, torch.Tensor]], then: float, x0_then: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the part of the integral up to lambda = `then` that comes from the change of x0.

    The change is relative to the newest entry (lambda, x0) of `history`. It is approximated by a polynomial through the
    older entries, and through `x0_then`, the prediction at `then`, if it is given. x0 and the result are (B, C, H, W).
    """
    *before, (now, x0) = history
    # an entry at lambda = -inf, where B is infinite, cannot be a point of the polynomial
    points = [((earlier - now) / (then - now), value - x0) for earlier, value in before if math.isfinite(earlier)]
    if x0_then is not None:
        points.append((1.0, x0_then - x0))
    total = torch.zeros_like(x0)
    for weight, (_, change) in zip(weights(then - now, [r for r, _ in points]), points, strict=True):
        total += weight * change
    return total


def weights(h: float, at: list[float]) -> list[float]:
    """Return quadrature weights w for the points `at`.

    sum_j w_j f(at_j) = integral over r in [0, 1] of h e^(-h (1 - r)) f(r), for f = r, r^2, ... , r^len(at).

    A single point is an exception, as in the paper: its weight uses half of the integral of 1. That is the same for
    small h. It is also correct for infinite h, if f is linear in e^lambda.
    """
    if not at:
        return []
    if len(at) == 1:
        return [-0.5 * math.expm1(-h) / at[0]]
    powers = range(1, len(at) + 1)
    matrix = np.array([[r**k for r in at] for k in powers])
    return np.linalg.solve(matrix, np.array([moment(h, k) for k in powers])).tolist()


def moment(h: float, k: int) -> float:
    """Return the integral over r in [0, 1] of h e^(-h (1 - r)) r^k, for h > 0 and k >= 0."""
    return h / (k + 1) * hyp1f1(1, k + 2, -h)
