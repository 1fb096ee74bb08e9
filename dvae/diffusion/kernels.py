"""A diffusion is a process on a schedule. Its kernels have a closed form for any linear process.

The formulation is due to Pandey & Mandt, ICCV 2023. The state u (B, k*C, H, W) holds its k components one after the
other along the channels: x, then m for k = 2. Let B(t) be the clock, A = -(D + Q) S_inf^-1, and S_0 the covariance of u
at t = 0 given u_0. Then

    q(u_t | u_0) = N(Phi u_0, S_t),    Phi = expm(A B(t)),    S_t = S_inf + Phi (S_0 - S_inf) Phi^T = L L^T

    reverse SDE, along falling B:         du = (-A u + 2 D score) dB + sqrt(2 D dB) w
    probability flow, along rising B:     du = (A u - D score) dB,      score = -L^-T eps

The same (k, k) matrices act on every channel and pixel. They are computed in float64 on the CPU, one per entry of t.
They are cast to the dtype and device of the state only when they are applied. Keep t on the CPU and u in float32.
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
"""One time in [0, 1] for the batch, or one per image, (B,)."""


@dataclass(frozen=True)
class Prediction:
    """A denoiser's estimate for u at time t, in three equivalent forms."""

    eps: torch.Tensor
    """The noise in u, (B, k*C, H, W): u = Phi u_0 + L eps."""
    x0: torch.Tensor
    """The clean image (B, C, H, W)."""
    score: torch.Tensor
    """grad_u log p_t(u) = -L^-T eps, (B, k*C, H, W)."""


class Matching(Enum):
    """The variables at t = 0 that training conditions on (Pandey & Mandt 2023, section 3.2).

    Both values are the same for k = 1.
    """

    hsm = "hsm"
    """Hybrid score matching: condition on x0. The other components are marginalized, and S_0 is their covariance."""
    dsm = "dsm"
    """Denoising score matching: condition on all of u_0. The other components are drawn, and S_0 = 0."""


class Factor(Enum):
    """The factor L with L L^T = S_t that multiplies the noise."""

    lower = "lower"
    """Lower triangular: the Cholesky factor."""
    upper = "upper"
    """Upper triangular."""


class Diffusion:
    """The forward process on the clock of its schedule.

    Raises UserError if the process is not valid, or if k > 1 and the schedule's B is infinite at t = 1.
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
                f"process={PROCESSES.name_of(process)} (k = {process.k}) predicts eps, which does not determine x0 at "
                f"t = 1 of schedule={SCHEDULES.name_of(schedule)}, because B is infinite there: use another schedule, "
                "such as constant"
            )
        self.process, self.schedule, self.k = process, schedule, process.k
        self.matching, self.factor = matching, factor
        self.D, self.S_inf = _matrix(process.D), _matrix(process.S_inf)
        self.A = -(self.D + _matrix(process.Q)) @ torch.linalg.inv(self.S_inf)
        self._A_back = -(self.D - _matrix(process.Q)) @ torch.linalg.inv(self.S_inf)
        self._aux_cov = _matrix(process.S_0)
        self._S_0 = self._aux_cov if matching is Matching.hsm else torch.zeros_like(self._aux_cov)
        self.predicted_components = self._find_predicted_components()
        """Indices of the components of eps that a network must predict. If it is one of k, `complete_eps` derives the
        others from it."""

    @cached_property
    def with_hsm(self) -> Diffusion:
        """The same diffusion with hybrid score matching, so that L L^T is the covariance of u_t given x0.

        It is this object itself for hybrid score matching and for k = 1.
        """
        if self.matching is Matching.hsm or self.k == 1:
            return self
        return Diffusion(self.process, self.schedule, factor=self.factor)

    # -- kernels: float64 on the CPU, one matrix per time ------------------------------------------------------------

    def marginal(self, t: Time) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (Phi, L) of q(u_t | u_0), each (B, k, k). L is triangular.

        For k > 1, t must be above 0, so that L L^T is positive definite.
        """
        Phi, S = self._kernel(self.A, self.schedule.integral(_scalars(t)), self._S_0)
        if self.k == 1:
            return Phi, S.sqrt()
        if self.factor is Factor.lower:
            return Phi, torch.linalg.cholesky(S)
        # flipping rows and columns turns the lower factor of the flipped matrix into an upper factor of S
        return Phi, torch.linalg.cholesky(S.flip(-1, -2)).flip(-1, -2)

    def transition(self, s: Time, t: Time) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (Phi, S), each (B, k, k), of q(u_t | u_s) = N(Phi u_s, S) for t > s."""
        return self._kernel(self.A, self.elapsed(s, t), torch.zeros_like(self.S_inf))

    def stationary_reverse_kernel(self, s: Time, t: Time) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (Phi, S), each (B, k, k), of q(u_s | u_t) = N(Phi u_t, S) for s < t, if u is stationary.

        The stationary u ~ N(0, S_inf), run backwards, is the process with the opposite sign of Q. That process keeps
        N(0, S_inf) too.
        """
        return self._kernel(self._A_back, self.elapsed(s, t), torch.zeros_like(self.S_inf))

    def elapsed(self, s: Time, t: Time) -> torch.Tensor:
        """Return B(t) - B(s), (B,)."""
        return self.schedule.integral(_scalars(t)) - self.schedule.integral(_scalars(s))

    def propagator(self, elapsed: torch.Tensor) -> torch.Tensor:
        """Return expm(A elapsed), (B, k, k), for differences `elapsed` (B,) of the clock B, of either sign."""
        return self._kernel(self.A, elapsed, self.S_inf)[0]

    def alpha(self, t: Time) -> torch.Tensor:
        """Return sqrt(abar_t), (B,), the factor of x0 in u_t. Raises ValueError if k > 1."""
        self._require_k1("alpha")
        return self.marginal(t)[0].flatten()

    def sigma(self, t: Time) -> torch.Tensor:
        """Return sqrt(1 - abar_t), (B,), the standard deviation of u_t given x0. Raises ValueError if k > 1."""
        self._require_k1("sigma")
        return self.marginal(t)[1].flatten()

    def log_snr(self, t: Time) -> torch.Tensor:
        """Return log(alpha / sigma), (B,), half the log of the signal-to-noise ratio.

        It is -inf if B is infinite. Raises ValueError if k > 1.
        """
        self._require_k1("log_snr")
        Phi, L = self.marginal(t)
        return torch.log(Phi / L).flatten()

    def posterior(self, s: Time, t: Time) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (c_x0, c_u, variance), each (B,), of q(u_s | u_t, x0) = N(c_x0 x0 + c_u u_t, variance) for s < t.

        These are equations 6 and 7 of Ho et al. 2020 for any two times, not only for neighbors in a table. At s = 0 the
        result is (1, 0, 0). Raises ValueError if k > 1.
        """
        self._require_k1("posterior")
        (Phi, S), (alpha_s, sigma_s), (_, sigma_t) = self.transition(s, t), self.marginal(s), self.marginal(t)
        share = S / sigma_t**2
        c_x0, c_u, variance = alpha_s * share, Phi * sigma_s**2 / sigma_t**2, sigma_s**2 * share
        return c_x0.flatten(), c_u.flatten(), variance.flatten()

    # -- applied to states -------------------------------------------------------------------------------------------

    def perturb(self, u0: torch.Tensor, t: Time, eps: torch.Tensor) -> torch.Tensor:
        """Return u_t = Phi u0 + L eps for eps ~ N(0, I); all are (B, k*C, H, W)."""
        Phi, L = self.marginal(t)
        return apply_matrix(Phi, u0) + apply_matrix(L, eps)

    def sample_prior(self, eps: torch.Tensor) -> torch.Tensor:
        """Return u_1 ~ N(0, S_inf) from eps ~ N(0, I); both are (B, k*C, H, W)."""
        return apply_matrix(torch.linalg.cholesky(self.S_inf), eps)

    def initial_state(self, x0: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Return the initial states u_0 (B, k*C, H, W) of images x0 (B, C, H, W).

        The components other than x0 are zero without `noise`. With noise ~ N(0, I), (B, k*C, H, W), they are drawn from
        their initial distribution. Pass noise for denoising score matching, and None for hybrid score matching.
        """
        u0 = torch.cat([x0, x0.new_zeros(len(x0), (self.k - 1) * x0.shape[1], *x0.shape[2:])], dim=1)
        if noise is None or self.k == 1:
            return u0
        spread = torch.zeros_like(self._aux_cov)
        spread[1:, 1:] = torch.linalg.cholesky(self._aux_cov[1:, 1:])
        return u0 + apply_matrix(spread, noise)

    def score_from_eps(self, eps: torch.Tensor, t: Time) -> torch.Tensor:
        """Return the score -L^-T eps, (B, k*C, H, W). t must be above 0."""
        return -apply_matrix(torch.linalg.inv(self.marginal(t)[1]).mT, eps)

    def eps_from_score(self, score: torch.Tensor, t: Time) -> torch.Tensor:
        """Return eps = -L^T score, (B, k*C, H, W). t must be above 0."""
        return -apply_matrix(self.marginal(t)[1].mT, score)

    def x0_from_eps(self, u: torch.Tensor, t: Time, eps: torch.Tensor) -> torch.Tensor:
        """Return x0 (B, C, H, W) for the expected eps given u. t must be above 0, and B(t) finite.

        Let p be the first column of Phi and S the covariance of u given x0 (L L^T with hybrid score matching). Then
        S score = p E[x0 | u] - u. These are k equations for one unknown. The solution that amplifies errors of eps
        least is

            x0 = p^T S^-1 (u + S score) / (p^T S^-1 p)

        It multiplies errors by 1 / sqrt(p^T S^-1 p). That is sigma / alpha for k = 1, and 260 for psld at t = 1 of
        schedule=constant. The first row of Phi^-1 (u - L eps) gives the same x0 if eps is exact, but it multiplies
        errors by 3.3e4 there.
        """
        column, weighting, _ = self._marginal_given_x0(t)
        snr = weighting @ column
        part = torch.linalg.inv(self.marginal(t)[1]) @ column
        return apply_matrix(weighting / snr, u) - apply_matrix(part.mT / snr, eps)

    def project_eps(self, u: torch.Tensor, t: Time, eps: torch.Tensor) -> torch.Tensor:
        """Project eps onto the values that some image x0 can explain: L^T S^-1 (u - p x0), (B, k*C, H, W).

        x0, p and S are as in `x0_from_eps`. t must be above 0. Given u, the expected eps has one degree of freedom per
        pixel and channel, which is x0. The projection removes errors of eps in the other k - 1. For k = 1 the result is
        eps itself.
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
        """Return eps = (u - alpha x0) / sigma, (B, C, H, W). t must be above 0. Raises ValueError if k > 1."""
        self._require_k1("eps_from_x0")
        Phi, L = self.marginal(t)
        return apply_matrix(1.0 / L, u - apply_matrix(Phi, x0))

    def shift_eps(self, change: torch.Tensor, t: Time, eps: torch.Tensor) -> torch.Tensor:
        """Return eps after x0 changes by `change` (B, C, H, W) at fixed u: eps - L^T S^-1 p change.

        p and S are as in `x0_from_eps`. t must be above 0. L^T S^-1 equals L^-1, except for denoising score matching
        with k > 1.
        """
        return eps - apply_matrix(self.marginal(t)[1].mT @ self._marginal_given_x0(t)[1].mT, change)

    def complete_eps(self, u: torch.Tensor, t: Time, part: torch.Tensor) -> torch.Tensor:
        """Return all of eps (B, k*C, H, W), given `part`, its n `predicted_components`, (B, n*C, H, W).

        With hybrid score matching, u = Phi (x0, 0, ...) + L eps gives k equations for the k unknowns. These are x0 and
        the k - 1 missing components.
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
        """Return E[eps | u_t] = L^T cov(u_t)^-1 u, (B, k*C, H, W), for data whose pixels are independent N(0, 1).

        t must be above 0.
        """
        Phi, L = self.marginal(t)
        start = self._aux_cov - self._S_0  # covariance of the components that denoising score matching draws
        start[0, 0] = 1.0
        covariance = Phi @ start @ Phi.mT + L @ L.mT
        return apply_matrix(L.mT @ torch.linalg.inv(covariance), u)

    # -- internal ----------------------------------------------------------------------------------------------------

    def _find_predicted_components(self) -> tuple[int, ...]:
        """Return the indices of the components of eps that the network must predict.

        The flow and the SDE use only the components of the score on which D acts. Because score = -L^-T eps, score_i
        depends on eps_j with j >= i for the lower factor, and with j <= i for the upper factor.
        """
        acts = [i for i in range(self.k) if self.D[i].any()]
        lower = self.factor is Factor.lower
        needed = range(min(acts), self.k) if lower else range(max(acts) + 1)
        alone = len(needed) == 1 and self.matching is Matching.hsm
        return tuple(needed) if alone else tuple(range(self.k))

    def _kernel(self, A: torch.Tensor, elapsed: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (Phi, S), each (B, k, k), after `elapsed` (B,) on the clock B, from covariance `start` (k, k)."""
        Phi, E = matrix_exp_and_expm1(elapsed[:, None, None] * A)
        # This is S_inf + Phi (start - S_inf) Phi^T, expanded with Phi = I + E. In this form the terms of order 1 do not
        # cancel, so S keeps its digits if little time elapsed.
        X = E @ (start - self.S_inf)
        return Phi, start + X + X.mT + X @ E.mT

    def _marginal_given_x0(self, t: Time) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (p (B, k, 1), p^T S^-1 (B, 1, k), S (B, k, k)) of q(u_t | x0) = N(p x0, S).

        The components of u_0 other than x0 are marginalized, whatever `matching` is.
        """
        Phi, S = self._kernel(self.A, self.schedule.integral(_scalars(t)), self._aux_cov)
        return Phi[:, :, :1], torch.linalg.solve(S, Phi[:, :, :1]).mT, S

    def _require_k1(self, what: str) -> None:
        if self.k != 1:
            raise ValueError(f"{what} needs a process with k = 1, but this process has k = {self.k}")


def _matrix(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float64))


def _scalars(t: Time) -> torch.Tensor:
    """Return t as (B,) float64 on the CPU. B is 1 for a float."""
    return torch.as_tensor(t, dtype=torch.float64, device="cpu").reshape(-1)


def _check(process: Process) -> None:
    """Raise UserError, naming the matrix, if N(0, S_inf) is not a stationary distribution of the process."""
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
