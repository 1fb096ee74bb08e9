"""Process + schedule = a diffusion: its kernels in closed form, for any linear process (Pandey & Mandt, ICCV 2023).

The state u (B, k*C, H, W) holds its k components one after the other along the channels: x, then m for k = 2. With the
clock B(t), A = -(D + Q) S_inf^-1 and the covariance S_0 of u at t = 0 given u_0,

    q(u_t | u_0) = N(Phi u_0, S_t),    Phi = expm(A B(t)),    S_t = S_inf + Phi (S_0 - S_inf) Phi^T = L L^T

    reverse SDE, along falling B:         du = (-A u + 2 D score) dB + sqrt(2 D dB) w
    probability flow, along rising B:     du = (A u - D score) dB,      score = -L^-T eps

where the matrices (k, k) act alike on every channel and pixel. They are computed in float64 on the CPU, one per entry
of t, and cast to the state's dtype and device only where they are applied: keep t on the CPU, and u in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import numpy as np
import torch

from dvae.diffusion.linalg import apply_matrix, matrix_exp_and_expm1
from dvae.errors import UserError
from dvae.registry.processes.base import PROCESSES, Process
from dvae.registry.schedules.base import SCHEDULES, Schedule

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


class Matching(Enum):
    """What training conditions on at t = 0; the same for k = 1 (Pandey & Mandt 2023, section 3.2)."""

    hsm = "hsm"
    """Hybrid score matching: on x0; the other components are marginalized, S_0 is theirs."""
    dsm = "dsm"
    """Denoising score matching: on all of u_0; the other components are drawn, S_0 = 0."""


class Factor(Enum):
    """Which L with L L^T = S_t multiplies the noise."""

    lower = "lower"
    """The Cholesky factor."""
    upper = "upper"
    """Upper triangular."""


class Diffusion:
    """The forward process on its clock.

    Raises UserError where the process is not a valid one, or where k > 1 meets a clock with an infinite end.
    """

    def __init__(
        self,
        process: Process,
        schedule: Schedule,
        *,
        matching: Matching = Matching.hsm,
        factor: Factor = Factor.lower,
    ) -> None:
        _check(process)
        if process.k > 1 and schedule.zero_terminal_snr:
            raise UserError(
                f"process={PROCESSES.name_of(process)} (k = {process.k}) predicts eps, which says nothing at t = 1 of "
                f"schedule={SCHEDULES.name_of(schedule)}, where B is infinite: use another schedule, such as constant"
            )
        self.process, self.schedule, self.k = process, schedule, process.k
        self.matching, self.factor = matching, factor
        self.D, self.S_inf = _matrix(process.D), _matrix(process.S_inf)
        self.A = -(self.D + _matrix(process.Q)) @ torch.linalg.inv(self.S_inf)
        self._A_back = -(self.D - _matrix(process.Q)) @ torch.linalg.inv(self.S_inf)
        self._aux_cov = _matrix(process.S_0)
        self._S_0 = self._aux_cov if matching is Matching.hsm else torch.zeros_like(self._aux_cov)
        self.predicted_components = self._find_predicted_components()
        """Components of eps that a network must predict; where it is one of k, the others follow from it."""

    @cached_property
    def with_hsm(self) -> Diffusion:
        """The same by hybrid score matching, where L L^T is the covariance of u_t given x0; itself if it is so."""
        if self.matching is Matching.hsm or self.k == 1:
            return self
        return Diffusion(self.process, self.schedule, factor=self.factor)

    # -- kernels: float64 on the CPU, one matrix per time ------------------------------------------------------------

    def marginal(self, t: Time) -> tuple[torch.Tensor, torch.Tensor]:
        """(Phi, L) of q(u_t | u_0), each (B, k, k); L is triangular. For k > 1 t must be above 0 (L L^T > 0)."""
        Phi, S = self._kernel(self.A, self.schedule.integral(_scalars(t)), self._S_0)
        if self.k == 1:
            return Phi, S.sqrt()
        if self.factor is Factor.lower:
            return Phi, torch.linalg.cholesky(S)
        return Phi, torch.linalg.cholesky(S.flip(-1, -2)).flip(-1, -2)

    def transition(self, s: Time, t: Time) -> tuple[torch.Tensor, torch.Tensor]:
        """(Phi, S), each (B, k, k), of q(u_t | u_s) = N(Phi u_s, S) for t > s."""
        return self._kernel(self.A, self.elapsed(s, t), torch.zeros_like(self.S_inf))

    def stationary_reverse_kernel(self, s: Time, t: Time) -> tuple[torch.Tensor, torch.Tensor]:
        """(Phi, S), each (B, k, k), of q(u_s | u_t) = N(Phi u_t, S) for s < t, were u stationary, u ~ N(0, S_inf).

        That is the process with Q of the other sign: it keeps N(0, S_inf) as well.
        """
        return self._kernel(self._A_back, self.elapsed(s, t), torch.zeros_like(self.S_inf))

    def elapsed(self, s: Time, t: Time) -> torch.Tensor:
        """B(t) - B(s), (B,)."""
        return self.schedule.integral(_scalars(t)) - self.schedule.integral(_scalars(s))

    def propagator(self, elapsed: torch.Tensor) -> torch.Tensor:
        """expm(A elapsed), (B, k, k), for `elapsed` (B,) on the clock B, of either sign."""
        return self._kernel(self.A, elapsed, self.S_inf)[0]

    def alpha(self, t: Time) -> torch.Tensor:
        """sqrt(abar_t), (B,): the factor of x0 in u_t. k = 1 only, else ValueError."""
        self._require_k1("alpha")
        return self.marginal(t)[0].flatten()

    def sigma(self, t: Time) -> torch.Tensor:
        """sqrt(1 - abar_t), (B,): the standard deviation of u_t given x0. k = 1 only, else ValueError."""
        self._require_k1("sigma")
        return self.marginal(t)[1].flatten()

    def log_snr(self, t: Time) -> torch.Tensor:
        """log(alpha / sigma), (B,), half the log of the signal-to-noise ratio; -inf where B is infinite.

        k = 1 only, else ValueError.
        """
        self._require_k1("log_snr")
        Phi, L = self.marginal(t)
        return torch.log(Phi / L).flatten()

    def posterior(self, s: Time, t: Time) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(c_x0, c_u, variance), each (B,): q(u_s | u_t, x0) = N(c_x0 x0 + c_u u_t, variance) for s < t.

        Equations 6 and 7 of Ho et al. 2020 for any two times, not only neighbors in a table; at s = 0 it is (1, 0, 0).
        k = 1 only, else ValueError.
        """
        self._require_k1("posterior")
        (Phi, S), (alpha_s, sigma_s), (_, sigma_t) = self.transition(s, t), self.marginal(s), self.marginal(t)
        share = S / sigma_t**2
        c_x0, c_u, variance = alpha_s * share, Phi * sigma_s**2 / sigma_t**2, sigma_s**2 * share
        return c_x0.flatten(), c_u.flatten(), variance.flatten()

    # -- applied to states -------------------------------------------------------------------------------------------

    def perturb(self, u0: torch.Tensor, t: Time, eps: torch.Tensor) -> torch.Tensor:
        """u_t = Phi u0 + L eps, all (B, k*C, H, W), with eps ~ N(0, I)."""
        Phi, L = self.marginal(t)
        return apply_matrix(Phi, u0) + apply_matrix(L, eps)

    def sample_prior(self, eps: torch.Tensor) -> torch.Tensor:
        """u_1 ~ N(0, S_inf) from eps ~ N(0, I), (B, k*C, H, W)."""
        return apply_matrix(torch.linalg.cholesky(self.S_inf), eps)

    def initial_state(self, x0: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """u_0 (B, k*C, H, W) of images x0 (B, C, H, W): the other components zero, or drawn from `noise`.

        Give noise ~ N(0, I), (B, k*C, H, W), for denoising score matching, none for hybrid score matching.
        """
        u0 = torch.cat([x0, x0.new_zeros(len(x0), (self.k - 1) * x0.shape[1], *x0.shape[2:])], dim=1)
        if noise is None or self.k == 1:
            return u0
        spread = torch.zeros_like(self._aux_cov)
        spread[1:, 1:] = torch.linalg.cholesky(self._aux_cov[1:, 1:])
        return u0 + apply_matrix(spread, noise)

    def score_from_eps(self, eps: torch.Tensor, t: Time) -> torch.Tensor:
        """-L^-T eps, (B, k*C, H, W); t above 0."""
        return -apply_matrix(torch.linalg.inv(self.marginal(t)[1]).mT, eps)

    def eps_from_score(self, score: torch.Tensor, t: Time) -> torch.Tensor:
        """-L^T score, (B, k*C, H, W); t above 0."""
        return -apply_matrix(self.marginal(t)[1].mT, score)

    def x0_from_eps(self, u: torch.Tensor, t: Time, eps: torch.Tensor) -> torch.Tensor:
        """x0 (B, C, H, W) for the expected eps given u; t above 0. Not where B is infinite.

        With p the first column of Phi and S the covariance of u given x0, which hybrid score matching factors,
        S score = p E[x0 | u] - u: k equations for one unknown. Errors of eps count least in
        x0 = p^T S^-1 (u + S score) / (p^T S^-1 p): times 1 / sqrt(p^T S^-1 p), which for k = 1 is sigma / alpha, and
        260 at t = 1 of psld with schedule=constant. In the first row of Phi^-1 (u - L eps), which is as right where
        eps is exact, they count 3.3e4 times there.
        """
        column, weighting, _ = self._marginal_given_x0(t)
        snr = weighting @ column
        part = torch.linalg.inv(self.marginal(t)[1]) @ column
        return apply_matrix(weighting / snr, u) - apply_matrix(part.mT / snr, eps)

    def project_eps(self, u: torch.Tensor, t: Time, eps: torch.Tensor) -> torch.Tensor:
        """L^T S^-1 (u - p x0) with the x0 of x0_from_eps, (B, k*C, H, W): what some image explains; t above 0.

        u alone tells all but one of the k components that the expected eps has: what is wrong in them is mended. For
        k = 1 that is eps itself.
        """
        if self.k == 1:
            return eps
        column, weighting, S = self._marginal_given_x0(t)
        L, snr = self.marginal(t)[1], weighting @ column
        projection = torch.linalg.solve(
            S, torch.eye(self.k, dtype=S.dtype, device=S.device) - column @ (weighting / snr)
        )
        gain = weighting.mT @ (torch.linalg.inv(L) @ column).mT / snr
        return apply_matrix(L.mT @ projection, u) + apply_matrix(L.mT @ gain, eps)

    def eps_from_x0(self, u: torch.Tensor, t: Time, x0: torch.Tensor) -> torch.Tensor:
        """eps = (u - alpha x0) / sigma, (B, C, H, W); t above 0. k = 1 only, else ValueError."""
        self._require_k1("eps_from_x0")
        Phi, L = self.marginal(t)
        return apply_matrix(1.0 / L, u - apply_matrix(Phi, x0))

    def shift_eps(self, change: torch.Tensor, t: Time, eps: torch.Tensor) -> torch.Tensor:
        """eps where x0 is changed by `change` (B, C, H, W) and u is not: eps - L^T S^-1 p change; t above 0.

        p and S as in x0_from_eps. L^T S^-1 is L^-1 but for denoising score matching with k > 1.
        """
        return eps - apply_matrix(self.marginal(t)[1].mT @ self._marginal_given_x0(t)[1].mT, change)

    def complete_eps(self, u: torch.Tensor, t: Time, part: torch.Tensor) -> torch.Tensor:
        """eps (B, k*C, H, W) from its `predicted_components` (B, C * number of them, H, W).

        With hybrid score matching u = Phi (x0, 0, ...) + L eps are k equations for x0 and the k - 1 missing components.
        """
        if len(self.predicted_components) == self.k:
            return part
        Phi, L = self.marginal(t)
        (known,) = self.predicted_components
        missing = [i for i in range(self.k) if i != known]
        unknown = torch.linalg.inv(torch.cat([Phi[:, :, :1], L[:, :, missing]], dim=2))[:, 1:]
        found = apply_matrix(unknown, u - apply_matrix(L[:, :, known : known + 1], part)).unflatten(1, (self.k - 1, -1))
        whole = list(found.unbind(1))
        whole.insert(known, part)
        return torch.cat(whole, dim=1)

    def eps_for_normal_data(self, u: torch.Tensor, t: Time) -> torch.Tensor:
        """E[eps | u_t], (B, k*C, H, W), were the pixels independent and N(0, 1): L^T cov(u_t)^-1 u; t above 0."""
        Phi, L = self.marginal(t)
        start = self._aux_cov - self._S_0  # what denoising score matching draws besides x0
        start[0, 0] = 1.0
        covariance = Phi @ start @ Phi.mT + L @ L.mT
        return apply_matrix(L.mT @ torch.linalg.inv(covariance), u)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _find_predicted_components(self) -> tuple[int, ...]:
        """The score matters only where D acts; score_i needs eps_j with j >= i (lower factor) or j <= i (upper)."""
        acts = [i for i in range(self.k) if self.D[i].any()]
        lower = self.factor is Factor.lower
        needed = range(min(acts), self.k) if lower else range(max(acts) + 1)
        alone = len(needed) == 1 and self.matching is Matching.hsm
        return tuple(needed) if alone else tuple(range(self.k))

    def _kernel(self, A: torch.Tensor, elapsed: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(Phi, S), each (B, k, k), `elapsed` (B,) later on the clock B, from covariance `start` (k, k)."""
        Phi, E = matrix_exp_and_expm1(elapsed[:, None, None] * A)
        # S_inf + Phi (start - S_inf) Phi^T with Phi = 1 + E: nothing cancels to first order where little time elapsed
        X = E @ (start - self.S_inf)
        return Phi, start + X + X.mT + X @ E.mT

    def _marginal_given_x0(self, t: Time) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(p (B, k, 1), p^T S^-1 (B, 1, k), S (B, k, k)) of q(u_t | x0) = N(p x0, S): the momentum is marginalized."""
        Phi, S = self._kernel(self.A, self.schedule.integral(_scalars(t)), self._aux_cov)
        return Phi[:, :, :1], torch.linalg.solve(S, Phi[:, :, :1]).mT, S

    def _require_k1(self, what: str) -> None:
        if self.k != 1:
            raise ValueError(f"{what} is defined for one component per channel, this process has k = {self.k}")


def _matrix(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float64))


def _scalars(t: Time) -> torch.Tensor:
    """t as (B,) float64 on the CPU; B = 1 for a float."""
    return torch.as_tensor(t, dtype=torch.float64, device="cpu").reshape(-1)


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
