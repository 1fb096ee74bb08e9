"""Diffusion exponential integrator."""

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
# row n: weights of the integral from -1 to NODES[n], exact for the polynomials that the nodes can tell apart
UP_TO = legendre.legval(NODES, legendre.legint(np.linalg.inv(legendre.legvander(NODES, len(NODES) - 1)), lbnd=-1)).T


@SAMPLERS.register("deis")
class DEIS(Sampler):
    """tAB-DEIS for any process: the probability flow, exact in its linear part (Zhang & Chen 2023, equation 14).

    u_s = Phi(s, t) u_t + sum_j C_j eps(t_j), where eps is extrapolated by a polynomial in t through the last `order`
    times, or p_s x0 + R_s eps(t) + sum_j C_j (eps(t_j) - eps(t)) with R as below, which rounds well also over a long
    step. Order 1 is ddim where k = 1. The first steps have fewer times behind them, hence a lower order.

    For k > 1 eps = -L^T score turns along the flow, fast near t = 1, even where the data are one image. So it is -R^T
    score which is extrapolated, R = L O, with the rotations O(t) that keep it constant there (Zhang, Tao & Chen 2023,
    gDDIM): R' = (A + D S^-1) R. Then order 1 is exact for one image, as ddim is; without O ten steps diverge on psld.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Sampler.Config):
        order: int = 3
        """1 to 3: times that the polynomial goes through."""
        spacing: Spacing = Spacing.quadratic
        """uniform | quadratic | log_snr | karras; eps goes like sqrt(t) near the data, which even steps in t miss."""

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
        # the C_j add up to R_s - Phi(s, t) R_t, and u_t is p x0 + R_t eps: so Phi(s, t), up to 1e6 and more, drops out
        Phi, L = diffusion.marginal(s)
        u = apply_matrix(Phi[:, :, :1], prediction.x0) + apply_matrix(L @ rotation, eps)
        for C_j, (_, before) in zip(C[:-1], history[:-1], strict=True):
            u = u + apply_matrix(C_j, before - eps)
        # in the basis in which O(s) = I
        state.history = [(time, apply_matrix(rotation, before)) for time, before in history]
        return u


@lru_cache(maxsize=4096)  # they are the same for every batch
def coefficients(
    diffusion: Diffusion, t: float, s: float, times: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(C (len(times), k, k), O(s) (k, k)), float64, in the basis in which O(t) = I.

    C_j = integral over the clock from t to s of Phi(s, tau) D L(tau)^-T O(tau) l_j(tau) dB, with the Lagrange
    polynomials l_j of `times`. By Gauss-Legendre quadrature in r = sqrt(B), in which the integrand is smooth although
    L goes to 0 with t.
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
    """W in dO/dB = W O, (n, k, k), skew-symmetric; zero for k = 1.

    R = L O in R' = (A + D S^-1) R gives W = M - L^-1 L' with M = L^-1 A L + L^-1 D L^-T, and L^-1 L' is triangular like
    L: so W is M in the other triangle.
    """
    M = to_score.mT @ (diffusion.A @ L + diffusion.D @ to_score)
    beyond = torch.triu(M, 1) if diffusion.factor is Factor.lower else torch.tril(M, -1)
    return beyond - beyond.mT


def _rotation(W: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """O at the nodes (n, k, k) and at the end (k, k), of dO/dx = W O from O = I at x = -1, by collocation."""
    n, k, eye = len(W), W.shape[-1], torch.eye(W.shape[-1], dtype=W.dtype)
    system = torch.einsum("nm,mab->namb", torch.from_numpy(UP_TO), W).reshape(n * k, n * k)
    rotation = torch.linalg.solve(torch.eye(n * k, dtype=W.dtype) - system, eye.repeat(n, 1)).view(n, k, k)
    return rotation, eye + torch.einsum("n,nab,nbc->ac", weights, W, rotation)


def _lagrange(times: tuple[float, ...], tau: torch.Tensor) -> torch.Tensor:
    """l_j(tau), (len(times), len(tau)): 1 at times[j], 0 at the others."""
    rows = []
    for own in times:
        row = torch.ones_like(tau)
        for other in times:
            if other != own:
                row = row * (tau - other) / (own - other)
        rows.append(row)
    return torch.stack(rows)
