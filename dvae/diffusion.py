"""Process + schedule = a diffusion: its kernels in closed form, for any linear process (Pandey & Mandt, ICCV 2023).

The state u (B, k*C, H, W) holds its k components one after the other along the channels: x, then m for k = 2. With the
clock B(t), A = -(D + Q) S_inf^-1 and the covariance S_0 of u at t = 0 given x0,

    q(u_t | u_0) = N(Phi u_0, S_t),    Phi = expm(A B(t)),    S_t = S_inf + Phi (S_0 - S_inf) Phi^T = L L^T

where the matrices (k, k) act alike on every channel and pixel. They are computed in float64 on the CPU, one per entry
of t, and cast to the state's dtype and device only where they are applied: keep t on the CPU, and u in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dvae.errors import UserError
from dvae.registry.processes import Process
from dvae.registry.schedules import Schedule

Time = float | torch.Tensor
"""A time in [0, 1], or one per image (B,)."""


@dataclass(frozen=True)
class Prediction:
    """What a denoiser says of u at time t: three views of one estimate."""

    eps: torch.Tensor
    """The noise in u, (B, k*C, H, W): u = Phi u_0 + L eps."""
    x0: torch.Tensor
    """The clean image (B, C, H, W)."""
    score: torch.Tensor
    """grad_u log p_t(u) = -L^-T eps, (B, k*C, H, W)."""


class Diffusion:
    """The forward process on its clock.

    S_0: (k, k) covariance of u at t = 0 given x0, where the process starts from more than a point (in hybrid score
    matching the momentum is drawn from it); zero by default. Raises UserError where the process is not a valid one.
    """

    def __init__(self, process: Process, schedule: Schedule, S_0: np.ndarray | None = None) -> None:
        _check(process)
        self.process, self.schedule, self.k = process, schedule, process.k
        self._A = torch.from_numpy(-(process.D + process.Q) @ np.linalg.inv(process.S_inf)).double()
        self._S_inf = torch.from_numpy(np.asarray(process.S_inf)).double()
        self._S_0 = torch.zeros_like(self._S_inf) if S_0 is None else torch.from_numpy(np.asarray(S_0)).double()

    # -- kernels: float64 on the CPU, one matrix per time ------------------------------------------------------------

    def marginal(self, t: Time) -> tuple[torch.Tensor, torch.Tensor]:
        """(Phi, L) of q(u_t | u_0), each (B, k, k); L is lower triangular. For k > 1 t must be above 0 (L L^T > 0)."""
        Phi, S = self._kernel(self.schedule.integral(_scalars(t)), self._S_0)
        return Phi, S.sqrt() if self.k == 1 else torch.linalg.cholesky(S)

    def transition(self, s: Time, t: Time) -> tuple[torch.Tensor, torch.Tensor]:
        """(Phi, S), each (B, k, k), of q(u_t | u_s) = N(Phi u_s, S) for t > s."""
        elapsed = self.schedule.integral(_scalars(t)) - self.schedule.integral(_scalars(s))
        return self._kernel(elapsed, torch.zeros_like(self._S_inf))

    def alpha(self, t: Time) -> torch.Tensor:
        """sqrt(abar_t), (B,): the factor of x0 in u_t. k = 1 only, else ValueError."""
        self._one_component("alpha")
        return self.marginal(t)[0].flatten()

    def sigma(self, t: Time) -> torch.Tensor:
        """sqrt(1 - abar_t), (B,): the standard deviation of u_t given x0. k = 1 only, else ValueError."""
        self._one_component("sigma")
        return self.marginal(t)[1].flatten()

    def posterior(self, s: Time, t: Time) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(c_x0, c_u, variance), each (B,): q(u_s | u_t, x0) = N(c_x0 x0 + c_u u_t, variance) for s < t.

        Equations 6 and 7 of Ho et al. 2020 for any two times, not only neighbours in a table; at s = 0 it is (1, 0, 0).
        k = 1 only, else ValueError.
        """
        self._one_component("posterior")
        (Phi, S), (alpha_s, sigma_s), (_, sigma_t) = self.transition(s, t), self.marginal(s), self.marginal(t)
        share = S / sigma_t**2
        c_x0, c_u, variance = alpha_s * share, Phi * sigma_s**2 / sigma_t**2, sigma_s**2 * share
        return c_x0.flatten(), c_u.flatten(), variance.flatten()

    # -- applied to states -------------------------------------------------------------------------------------------

    def perturb(self, u0: torch.Tensor, t: Time, eps: torch.Tensor) -> torch.Tensor:
        """u_t = Phi u0 + L eps, all (B, k*C, H, W), with eps ~ N(0, I)."""
        Phi, L = self.marginal(t)
        return _apply(Phi, u0) + _apply(L, eps)

    def prior(self, eps: torch.Tensor) -> torch.Tensor:
        """u_1 ~ N(0, S_inf) from eps ~ N(0, I), (B, k*C, H, W)."""
        return _apply(torch.linalg.cholesky(self._S_inf)[None], eps)

    def score_from_eps(self, eps: torch.Tensor, t: Time) -> torch.Tensor:
        """-L^-T eps, (B, k*C, H, W); t above 0."""
        return -_apply(torch.linalg.inv(self.marginal(t)[1]).mT, eps)

    def x0_from_eps(self, u: torch.Tensor, t: Time, eps: torch.Tensor) -> torch.Tensor:
        """x0 (B, C, H, W), the first component of Phi^-1 (u - L eps)."""
        Phi, L = self.marginal(t)
        return _apply(torch.linalg.inv(Phi)[:, :1], u - _apply(L, eps))

    def eps_from_x0(self, u: torch.Tensor, t: Time, x0: torch.Tensor) -> torch.Tensor:
        """eps = (u - alpha x0) / sigma, (B, C, H, W); t above 0. k = 1 only, else ValueError."""
        self._one_component("eps_from_x0")
        Phi, L = self.marginal(t)
        return _apply(1.0 / L, u - _apply(Phi, x0))

    # -- inside ------------------------------------------------------------------------------------------------------

    def _kernel(self, elapsed: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(Phi, S), each (B, k, k), `elapsed` (B,) later on the clock B, from covariance `start` (k, k)."""
        exponent = elapsed[:, None, None] * self._A
        if self.k == 1:
            Phi, E = torch.exp(exponent), torch.expm1(exponent)
        else:
            Phi, E = _matrix_exp_and_expm1(exponent)
        # S_inf + Phi (start - S_inf) Phi^T with Phi = 1 + E: nothing cancels to first order where little time elapsed
        X = E @ (start - self._S_inf)
        return Phi, start + X + X.mT + X @ E.mT

    def _one_component(self, what: str) -> None:
        if self.k != 1:
            raise ValueError(f"{what} is defined for one component per channel, this process has k = {self.k}")


def _scalars(t: Time) -> torch.Tensor:
    """t as (B,) float64 on the CPU; B = 1 for a float."""
    return torch.as_tensor(t, dtype=torch.float64, device="cpu").reshape(-1)


def _apply(matrix: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """matrix (B or 1, j, k) on the components of u (B, k*C, H, W), giving (B, j*C, H, W) in u's dtype and device."""
    matrix = matrix.to(u.device, u.dtype)[..., None, None, None]
    if matrix.shape[2] == 1:
        return matrix[:, 0, 0] * u
    # written out, because autocast would run a matrix product in bfloat16
    return (matrix * u.unflatten(1, (matrix.shape[2], -1))[:, None]).sum(2).flatten(1, 2)


def _matrix_exp_and_expm1(X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(expm(X), expm(X) - I), each (B, k, k); the second keeps its digits where X is small.

    expm([[X, I], [0, 0]]) = [[expm(X), phi], [0, I]], where phi = I + X/2! + X^2/3! + ... and so X phi = expm(X) - I.
    """
    k = X.shape[-1]
    top = torch.cat([X, torch.eye(k, dtype=X.dtype, device=X.device).expand_as(X)], dim=-1)
    block = torch.linalg.matrix_exp(torch.cat([top, torch.zeros_like(top)], dim=-2))[:, :k]
    return block[..., :k], X @ block[..., k:]


def _check(process: Process) -> None:
    """Raise UserError, naming the matrix, where exp(-u^T S_inf^-1 u / 2) is not stationary under the process."""
    D, Q, S_inf = (np.asarray(matrix, dtype=np.float64) for matrix in (process.D, process.Q, process.S_inf))
    faults = {
        "D must be symmetric positive semi-definite": not np.allclose(D, D.T) or np.linalg.eigvalsh(D).min() < -1e-12,
        "Q must be skew-symmetric (Q^T = -Q)": not np.allclose(Q, -Q.T),
        "S_inf must be symmetric positive definite": not np.allclose(S_inf, S_inf.T)
        or np.linalg.eigvalsh(S_inf).min() <= 0,
    }
    for rule, broken in faults.items():
        if broken:
            name = type(process).__name__
            raise UserError(f"process {name}: {rule}; D = {D.tolist()}, Q = {Q.tolist()}, S_inf = {S_inf.tolist()}")
