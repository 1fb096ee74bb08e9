"""Kernels against closed forms, exact arithmetic and an integrated Lyapunov equation."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from dvae.diffusion import Diffusion
from dvae.errors import UserError
from dvae.registry import PROCESSES, SCHEDULES, Shapes
from dvae.registry.processes import Process

IO = Shapes(image_size=4)
SCHEDULE_NAMES = ["ddpm_linear", "cosine"]


def vp(schedule: str) -> Diffusion:
    return Diffusion(PROCESSES.build({"name": "vp"}, IO), SCHEDULES.build({"name": schedule}, IO))


class Matrices(Process):
    """A process given by its matrices."""

    def __init__(self, D: np.ndarray, Q: np.ndarray, S_inf: np.ndarray) -> None:
        self.D, self.Q, self.S_inf = D, Q, S_inf


def random_process(seed: int) -> Matrices:
    rng = np.random.default_rng(seed)
    root, spread = rng.normal(size=(2, 2)), rng.normal(size=(2, 2))
    q = rng.normal()
    return Matrices(0.3 * root @ root.T, np.array([[0.0, q], [-q, 0.0]]), spread @ spread.T + 0.3 * np.eye(2))


def momentum(seed: int = 0) -> Diffusion:
    """A random process with k = 2; its S_0 lets the momentum alone start with a spread."""
    return Diffusion(random_process(seed), SCHEDULES.build({"name": "cosine"}, IO), np.diag([0.0, 0.04]))


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


# -- vp against exact arithmetic --


def ddpm_exact() -> tuple[list, list]:
    """(betas, abar) of DDPM's table at 40 digits; abar[-1] is 1, that of the clean image."""
    with mpmath.workdps(40):
        start, end = mpmath.mpf("0.0001"), mpmath.mpf("0.02")
        betas = [start + (end - start) * i / 999 for i in range(1000)]
        abar, product = [], mpmath.mpf(1)
        for beta in betas:
            product *= 1 - beta
            abar.append(product)
        return betas, [*abar, mpmath.mpf(1)]


@pytest.mark.parametrize("i", [0, 1, 500, 999])
def test_ddpm_tables(i: int) -> None:
    betas, abar = ddpm_exact()
    diffusion = vp("ddpm_linear")
    s, t = i / 1000, (i + 1) / 1000
    with mpmath.workdps(40):
        beta, a, before = betas[i], abar[i], abar[i - 1]
        expected = {
            "sqrt_abar": mpmath.sqrt(a),
            "sqrt_one_minus_abar": mpmath.sqrt(1 - a),
            "c1": mpmath.sqrt(before) * beta / (1 - a),
            "c2": mpmath.sqrt(1 - beta) * (1 - before) / (1 - a),
            "posterior_variance": beta * (1 - before) / (1 - a),
            "beta": beta,
        }
    c1, c2, variance = diffusion.posterior(s, t)
    got = {
        "sqrt_abar": diffusion.alpha(t),
        "sqrt_one_minus_abar": diffusion.sigma(t),
        "c1": c1,
        "c2": c2,
        "posterior_variance": variance,
        "beta": diffusion.transition(s, t)[1],
    }
    assert {k: v.item() for k, v in got.items()} == {
        k: pytest.approx(float(v), rel=1e-12, abs=1e-15) for k, v in expected.items()
    }


@pytest.mark.parametrize("i", [1, 2, 501, 998])
def test_cosine_kernel(i: int) -> None:
    with mpmath.workdps(40):
        s = mpmath.mpf("0.008")
        f = [mpmath.cos((mpmath.mpf(j) / 1000 + s) / (1 + s) * mpmath.pi / 2) ** 2 for j in (0, i - 1, i)]
        before, a = f[1] / f[0], f[2] / f[0]
        beta = 1 - a / before
        expected = [mpmath.sqrt(before) * beta / (1 - a), mpmath.sqrt(a / before) * (1 - before) / (1 - a)]
        expected.append(beta * (1 - before) / (1 - a))
    got = vp("cosine").posterior((i - 1) / 1000, i / 1000)
    assert [v.item() for v in got] == [pytest.approx(float(v), rel=1e-12, abs=1e-14) for v in expected]


def test_sigma_keeps_its_digits_near_t_0() -> None:
    with mpmath.workdps(40):
        table = -mpmath.expm1(mpmath.mpf("0.01") * mpmath.log1p(mpmath.mpf("-0.0001")))  # B is linear up to t = 1/1000
        s, t = mpmath.mpf("0.008"), mpmath.mpf("1e-5")
        angle = mpmath.pi / 2 / (1 + s)
        cosine = 1 - (mpmath.cos((t + s) * angle) / mpmath.cos(s * angle)) ** 2
    assert vp("ddpm_linear").sigma(1e-5).item() ** 2 == pytest.approx(float(table), rel=1e-12, abs=0)
    assert vp("cosine").sigma(1e-5).item() ** 2 == pytest.approx(float(cosine), rel=1e-12, abs=0)


def test_clean_end() -> None:
    diffusion = vp("ddpm_linear")
    assert (diffusion.alpha(0.0).item(), diffusion.sigma(0.0).item()) == (1.0, 0.0)
    assert [v.item() for v in diffusion.posterior(0.0, 0.3)] == [1.0, 0.0, 0.0]


def test_formulation_2_is_formulation_1_shifted() -> None:
    """The authors' second process has mean sqrt(abar) x0 + x_hat. Its posterior, derived here by the product of its own
    Gaussian transition and marginal, is theirs (c1 x0 + c2 x_t + (1 - c2) x_hat), and ours in y = x_t - x_hat."""
    diffusion = vp("ddpm_linear")
    x0, x_hat, x_t = draw(0, 3, 50)
    for s, t in [(0.001, 0.002), (0.4, 0.5), (0.999, 1.0)]:
        Phi, S = (m.item() for m in diffusion.transition(s, t))
        a, v = diffusion.alpha(s).item(), diffusion.sigma(s).item() ** 2
        precision = Phi**2 / S + 1 / v
        bayes = (Phi * (x_t - (1 - Phi) * x_hat) / S + (a * x0 + x_hat) / v) / precision
        c1, c2, _ = (value.item() for value in diffusion.posterior(s, t))
        theirs = c1 * x0 + c2 * x_t + (1 - c2) * x_hat
        ours = c1 * x0 + c2 * (x_t - x_hat) + x_hat
        torch.testing.assert_close(theirs, bayes, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours, bayes, rtol=0, atol=1e-12)


# -- any schedule, any times --

times = st.floats(1e-4, 1.0)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(SCHEDULE_NAMES), st.lists(st.floats(1e-4, 0.98), min_size=3, max_size=3), st.integers(0, 99))
def test_perturb_round_trips(name: str, t: list[float], seed: int) -> None:
    diffusion, t_batch = vp(name), torch.tensor(t, dtype=torch.float64)
    x0, eps = draw(seed, 2, 3, 2, 4, 4)
    u = diffusion.perturb(x0, t_batch, eps)
    torch.testing.assert_close(diffusion.x0_from_eps(u, t_batch, eps), x0, rtol=0, atol=1e-11)
    torch.testing.assert_close(diffusion.eps_from_x0(u, t_batch, x0), eps, rtol=0, atol=1e-10)
    one = diffusion.perturb(x0[1:2], t[1], eps[1:2])  # a float is the same as a batch of that time
    torch.testing.assert_close(one, u[1:2], rtol=0, atol=0)


@settings(max_examples=50, deadline=None)
@given(st.booleans(), st.lists(times, min_size=3, max_size=3, unique=True), st.integers(0, 20))
def test_transitions_compose(k2: bool, t: list[float], seed: int) -> None:
    diffusion = momentum(seed) if k2 else vp("cosine")
    r, s, t_end = sorted(t)
    (Phi_rs, S_rs), (Phi_st, S_st), (Phi_rt, S_rt) = (
        diffusion.transition(*pair) for pair in ((r, s), (s, t_end), (r, t_end))
    )
    torch.testing.assert_close(Phi_st @ Phi_rs, Phi_rt, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(Phi_st @ S_rs @ Phi_st.mT + S_st, S_rt, rtol=1e-9, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.booleans(), times, times, st.integers(0, 20))
def test_marginal_after_transition_is_marginal(k2: bool, s: float, t: float, seed: int) -> None:
    diffusion = momentum(seed) if k2 else vp("ddpm_linear")
    s, t = min(s, t), max(s, t)
    (Phi_s, L_s), (Phi_t, L_t), (Phi, S) = diffusion.marginal(s), diffusion.marginal(t), diffusion.transition(s, t)
    torch.testing.assert_close(Phi @ Phi_s, Phi_t, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(Phi @ L_s @ L_s.mT @ Phi.mT + S, L_t @ L_t.mT, rtol=1e-9, atol=1e-12)


def test_state_dtype_is_kept() -> None:
    diffusion = vp("cosine")
    x0, eps = draw(0, 2, 3, 2, 4, 4).float()
    t = torch.tensor([0.1, 0.5, 0.9])
    u = diffusion.perturb(x0, t, eps)
    for value in (u, diffusion.x0_from_eps(u, t, eps), diffusion.score_from_eps(eps, t), diffusion.prior(eps)):
        assert value.dtype == torch.float32
    assert diffusion.alpha(t).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):  # kernels stay exact inside a mixed-precision step
        torch.testing.assert_close(diffusion.perturb(x0, t, eps), u, rtol=0, atol=0)


@pytest.mark.parametrize("make", [lambda: vp("cosine"), momentum])
def test_default_device_is_of_no_account(make: Callable[[], Diffusion]) -> None:
    """Models are also built on the meta device, and someone may have made a GPU the default."""
    with torch.device("meta"):
        diffusion = make()
        kernels = [*diffusion.marginal(0.4), *diffusion.transition(0.2, 0.4)]
    expected = [*make().marginal(0.4), *make().transition(0.2, 0.4)]
    assert all(torch.equal(a, b) for a, b in zip(kernels, expected, strict=True))


# -- k = 2 --


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("t", [1e-3, 0.3, 0.9])
def test_k2_kernel_solves_the_lyapunov_equation(seed: int, t: float) -> None:
    process, S_0 = random_process(seed), np.diag([0.0, 0.04])
    diffusion = Diffusion(process, SCHEDULES.build({"name": "cosine"}, IO), S_0)
    A = -(process.D + process.Q) @ np.linalg.inv(process.S_inf)

    def slope(B: float, y: np.ndarray) -> np.ndarray:
        Phi, S = y.reshape(2, 2, 2)
        return np.stack([A @ Phi, A @ S + S @ A.T + 2 * process.D]).ravel()

    B = diffusion.schedule.integral(torch.tensor(t, dtype=torch.float64)).item()
    start = np.stack([np.eye(2), S_0]).ravel()
    Phi, S = solve_ivp(slope, (0, B), start, method="DOP853", rtol=1e-13, atol=1e-15).y[:, -1].reshape(2, 2, 2)
    got_Phi, L = (m[0].numpy() for m in diffusion.marginal(t))
    np.testing.assert_allclose(got_Phi, Phi, rtol=0, atol=1e-10)
    np.testing.assert_allclose(L @ L.T, S, rtol=0, atol=1e-10)


def test_k2_covariance_keeps_its_digits_near_t_0() -> None:
    """Noise enters the momentum only, so x has a variance of order B^3: the plain difference would lose it."""
    D, S_inf = np.diag([0.0, 0.5]), np.diag([1.0, 0.25])
    Q = np.array([[0.0, -0.5], [0.5, 0.0]])
    diffusion = Diffusion(Matrices(D, Q, S_inf), SCHEDULES.build({"name": "ddpm_linear"}, IO))
    _, L = diffusion.marginal(1e-3)
    with mpmath.workdps(40):
        B = mpmath.mpf(-mpmath.log1p(mpmath.mpf("-0.0001")))
        Phi = mpmath.expm(mpmath.matrix((-(D + Q) @ np.linalg.inv(S_inf)).tolist()) * B)
        S = mpmath.matrix(S_inf.tolist())
        S = S - Phi * S * Phi.T
    assert (L[0, 0, 0] ** 2).item() == pytest.approx(float(S[0, 0]), rel=1e-9, abs=0)


def test_k2_score_is_the_gradient_of_the_log_density() -> None:
    diffusion, t = momentum(), torch.tensor([0.2, 0.7], dtype=torch.float64)
    u0, eps = draw(1, 2, 2, 6, 2, 2)
    u = diffusion.perturb(u0, t, eps).requires_grad_()
    Phi, L = diffusion.marginal(t)
    parts, parts0 = (state.unflatten(1, (2, 3)) for state in (u, u0))  # (B, k, C, H, W)
    residual = parts - torch.einsum("bij,bjchw->bichw", Phi, parts0)
    precision = torch.linalg.inv(L @ L.mT)
    log_density = -0.5 * torch.einsum("bichw,bij,bjchw->", residual, precision, residual)
    (gradient,) = torch.autograd.grad(log_density, u)
    torch.testing.assert_close(diffusion.score_from_eps(eps, t), gradient, rtol=1e-9, atol=1e-9)


def test_k2_x0_is_the_first_component() -> None:
    diffusion, t = momentum(), torch.tensor([0.2, 0.7], dtype=torch.float64)
    u0, eps = draw(2, 2, 2, 6, 2, 2)
    x0 = diffusion.x0_from_eps(diffusion.perturb(u0, t, eps), t, eps)
    torch.testing.assert_close(x0, u0[:, :3], rtol=0, atol=1e-10)


def test_k2_prior_has_the_stationary_covariance() -> None:
    process = random_process(3)
    u = momentum(3).prior(draw(3, 1, 2 * 50_000, 1, 1)).reshape(2, -1)
    np.testing.assert_allclose(np.cov(u.numpy()), process.S_inf, rtol=0, atol=0.03 * process.S_inf.max())


def test_k2_has_no_alpha() -> None:
    for call in (lambda d: d.alpha(0.5), lambda d: d.sigma(0.5), lambda d: d.posterior(0.4, 0.5)):
        with pytest.raises(ValueError, match="k = 2"):
            call(momentum())


@pytest.mark.parametrize(
    ("D", "Q", "S_inf", "named"),
    [
        ([[-1.0]], [[0.0]], [[1.0]], "D must"),
        ([[0.5]], [[0.1]], [[1.0]], "Q must"),
        ([[0.5]], [[0.0]], [[0.0]], "S_inf must"),
    ],
)
def test_an_invalid_process_is_refused(D: list, Q: list, S_inf: list, named: str) -> None:
    process = Matrices(np.array(D), np.array(Q), np.array(S_inf))
    with pytest.raises(UserError, match=named):
        Diffusion(process, SCHEDULES.build({"name": "cosine"}, IO))
