"""DEIS, the diffusion exponential integrator sampler."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.polynomial import legendre

from dvae.diffusion.kernels import Diffusion, Factor
from dvae.diffusion.linalg import apply_matrix
from dvae.diffusion.time_grid import Spacing
from dvae.errors import UserError
from dvae.registry.core import Shapes
from dvae.registry.samplers.base import SAMPLERS, Sampler, SamplerState

NODES, WEIGHTS = legendre.leggauss(48)
# Row n holds the weights of the integral from -1 to NODES[n]. They are exact for polynomials of degree below 48, which
# are determined by their values at the 48 nodes.
UP_TO = legendre.legval(NODES, legendre.legint(np.linalg.inv(legendre.legvander(NODES, len(NODES) - 1)), lbnd=-1)).T


@SAMPLERS.register("deis")
class DEIS(Sampler):
    """tAB-DEIS for any process. It solves the linear part of the flow exactly (Zhang & Chen 2023, equation 14).

    eps is extrapolated by a polynomial in t through the last `order` times t_j:

        u_s = Phi(s, t) u_t + sum_j C_j eps(t_j)
            = p_s x0 + R_s eps(t) + sum_j C_j (eps(t_j) - eps(t))

    The code uses the second form, with R as below, because its rounding errors are small even over a long step. Order 1
    is ddim if k = 1. The first steps have fewer earlier times, so their order is lower.

    For k > 1, eps = -L^T score rotates along the flow, even if the data are a single image. The rotation is fast near
    t = 1. So -R^T score is extrapolated instead, with R = L O. The rotations O(t) keep it constant for a single image
    (Zhang, Tao & Chen 2023, gDDIM): R' = (A + D S^-1) R. Then order 1 is exact for a single image, as ddim is. Without
    O, ten steps diverge on psld.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Sampler.Config):
        order: int = 3
        """Number of times that the polynomial goes through, 1 to 3."""
        spacing: Spacing = Spacing.quadratic
        """Spacing of the times: uniform | quadratic | log_snr | karras. Near the data eps changes like sqrt(t), which
        uniform steps in t do not resolve."""

    config: Config

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        if config.order not in (1, 2, 3):
            raise UserError(f"sampler.order={config.order}: must be 1, 2 or 3")

    def supports(self, diffusion: Diffusion) -> bool:
        return not diffusion.schedule.zero_terminal_snr

    def step(self, state: SamplerState, u: torch.Tensor, t: float, s: float) -> torch.Tensor:
        diffusion, prediction = state.diffusion.with_hsm, state.predict(u, t)
        eps = prediction.eps if diffusion is state.diffusion else diffusion.eps_from_score(prediction.score, t)
        history = [*state.history, (t, eps)][-self.config.order :]
        C, rotation = coefficients(diffusion, t, s, tuple(time for time, _ in history))
        # The C_j add up to R_s - Phi(s, t) R_t, and u_t = p x0 + R_t eps. So Phi(s, t), whose entries can be 1e6 or
        # more, drops out of the sum.
        Phi, L = diffusion.marginal(s)
        u = apply_matrix(Phi[:, :, :1], prediction.x0) + apply_matrix(L @ rotation, eps)
        for C_j, (_, before) in zip(C[:-1], history[:-1], strict=True):
            u = u + apply_matrix(C_j, before - eps)
        # the next step starts at s and needs the history in the basis in which O(s) = I
        state.history = [(time, apply_matrix(rotation, before)) for time, before in history]
        return u


@lru_cache(maxsize=4096)  # the coefficients are the same for every batch
def coefficients(
    diffusion: Diffusion, t: float, s: float, times: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (C (len(times), k, k), O(s) (k, k)), float64, in the basis in which O(t) = I.

    C_j = integral over the clock from t to s of Phi(s, tau) D L(tau)^-T O(tau) l_j(tau) dB, with the Lagrange
    polynomials l_j of `times`. The integral is computed by Gauss-Legendre quadrature in r = sqrt(B). In this variable
    the integrand is smooth, although L goes to 0 with t.
    """
    r_s, r_t = diffusion.elapsed(0.0, torch.tensor([s, t], dtype=torch.float64)).sqrt()
    half = 0.5 * (r_s - r_t)
    r = r_t + half * (1.0 + torch.from_numpy(NODES))
    dB = 2.0 * r * half
    tau = diffusion.schedule.inverse(r**2)
    L = diffusion.marginal(tau)[1]
    to_score = torch.linalg.inv(L).mT
    weights = torch.from_numpy(WEIGHTS)
    rotation, rotation_s = _rotation(_rotation_rate(diffusion, L, to_score) * dB[:, None, None], weights)
    integrand = diffusion.propagator(r_s**2 - r**2) @ diffusion.D @ to_score @ rotation
    return torch.einsum("jn,n,nab->jab", _lagrange(times, tau), dB * weights, integrand), rotation_s


def _rotation_rate(diffusion: Diffusion, L: torch.Tensor, to_score: torch.Tensor) -> torch.Tensor:
    """Return W in dO/dB = W O, (n, k, k). It is skew-symmetric, and zero for k = 1.

    R = L O in R' = (A + D S^-1) R gives W = M - L^-1 L' with M = L^-1 A L + L^-1 D L^-T. L^-1 L' is triangular like L,
    so W equals M in the other triangle. Its skew symmetry gives the rest.
    """
    M = to_score.mT @ (diffusion.A @ L + diffusion.D @ to_score)
    beyond = torch.triu(M, 1) if diffusion.factor is Factor.lower else torch.tril(M, -1)
    return beyond - beyond.mT


def _rotation(W: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve dO/dx = W O from O = I at x = -1 by collocation, for W (n, k, k) at the nodes.

    Returns O at the nodes, (n, k, k), and O at the end x = 1, (k, k).
    """
    n, k, eye = len(W), W.shape[-1], torch.eye(W.shape[-1], dtype=W.dtype)
    system = torch.einsum("nm,mab->namb", torch.from_numpy(UP_TO), W).reshape(n * k, n * k)
    rotation = torch.linalg.solve(torch.eye(n * k, dtype=W.dtype) - system, eye.repeat(n, 1)).view(n, k, k)
    return rotation, eye + torch.einsum("n,nab,nbc->ac", weights, W, rotation)


def _lagrange(times: tuple[float, ...], tau: torch.Tensor) -> torch.Tensor:
    """Return the Lagrange polynomials l_j(tau), (len(times), len(tau)): 1 at times[j], and 0 at the other times."""
    rows = []
    for own in times:
        row = torch.ones_like(tau)
        for other in times:
            if other != own:
                row = row * (tau - other) / (own - other)
        rows.append(row)
    return torch.stack(rows)
