"""Kernels against closed forms, exact arithmetic and an integrated Lyapunov equation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from tests_support import ROOT

from dvae.diffusion.kernels import Diffusion, Factor, Matching
from dvae.diffusion.linalg import apply_matrix
from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.processes.base import PROCESSES, Process
from dvae.registry.schedules.base import SCHEDULES

IO = Shapes(image_size=4)
SCHEDULE_NAMES = ["ddpm_linear", "cosine", "linear", "geometric"]
PROCESSES_OF_THE_PAPERS = ["vp", "psld", "cld"]


def vp(schedule: str) -> Diffusion:
    return Diffusion(PROCESSES.build({"name": "vp"}, IO), SCHEDULES.build({"name": schedule}, IO))


class Matrices(Process):
    """A process given by its matrices."""

    def __init__(self, D: np.ndarray, Q: np.ndarray, S_inf: np.ndarray) -> None:
        self.D, self.Q, self.S_inf = D, Q, S_inf


def random_process(seed: int, k: int = 2) -> Matrices:
    rng = np.random.default_rng(seed)
    root, spread, q = rng.normal(size=(3, k, k))
    return Matrices(0.3 * root @ root.T, q - q.T, spread @ spread.T + 0.3 * np.eye(k))


def momentum(seed: int = 0, k: int = 2, **more) -> Diffusion:
    """A random process; its momentum starts with a spread."""
    return Diffusion(random_process(seed, k), SCHEDULES.build({"name": "cosine"}, IO), **more)


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
    for value in (u, diffusion.x0_from_eps(u, t, eps), diffusion.score_from_eps(eps, t), diffusion.sample_prior(eps)):
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


def integrated(diffusion: Diffusion, t: float) -> tuple[np.ndarray, np.ndarray]:
    """(Phi, S) at t by integrating dPhi/dB = A Phi, dS/dB = A S + S A^T + 2 D."""
    process = diffusion.process
    k, A = diffusion.k, -(process.D + process.Q) @ np.linalg.inv(process.S_inf)
    S_0 = process.S_0 if diffusion.matching is Matching.hsm else np.zeros((k, k))

    def slope(B: float, y: np.ndarray) -> np.ndarray:
        Phi, S = y.reshape(2, k, k)
        return np.stack([A @ Phi, A @ S + S @ A.T + 2 * process.D]).ravel()

    B = diffusion.schedule.integral(torch.tensor(t, dtype=torch.float64)).item()
    start = np.stack([np.eye(k), S_0]).ravel()
    Phi, S = solve_ivp(slope, (0, B), start, method="DOP853", rtol=1e-13, atol=1e-15).y[:, -1].reshape(2, k, k)
    return Phi, S


def assert_solves_lyapunov(diffusion: Diffusion, t: float) -> None:
    Phi, S = integrated(diffusion, t)
    got_Phi, L = (m[0].numpy() for m in diffusion.marginal(t))
    np.testing.assert_allclose(got_Phi, Phi, rtol=0, atol=1e-10)
    np.testing.assert_allclose(L @ L.T, S, rtol=0, atol=1e-10)


@pytest.mark.parametrize("matching", list(Matching))
@pytest.mark.parametrize("factor", list(Factor))
@pytest.mark.parametrize("t", [1e-3, 0.3, 1.0])
@pytest.mark.parametrize("name", PROCESSES_OF_THE_PAPERS)
def test_kernels_of_the_papers_solve_the_lyapunov_equation(
    name: str, t: float, factor: Factor, matching: Matching
) -> None:
    process, schedule = PROCESSES.build({"name": name}, IO), SCHEDULES.build({"name": "constant"}, IO)
    assert_solves_lyapunov(Diffusion(process, schedule, matching=matching, factor=factor), t)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-3, 0.95), st.sampled_from([2, 3]), st.sampled_from(list(Matching)))
def test_kernels_of_any_process_solve_the_lyapunov_equation(seed: int, t: float, k: int, matching: Matching) -> None:
    assert_solves_lyapunov(momentum(seed, k, matching=matching), t)


@pytest.mark.parametrize("matching", list(Matching))
@pytest.mark.parametrize("factor", list(Factor))
@pytest.mark.parametrize("name", ["psld", "cld"])
def test_the_covariance_is_positive_definite_down_to_1e_minus_5(name: str, factor: Factor, matching: Matching) -> None:
    """In float32 that of CLD, whose gamma is 0, is not below about 4e-4; and each factor is triangular on its side."""
    process, schedule = PROCESSES.build({"name": name}, IO), SCHEDULES.build({"name": "constant"}, IO)
    t = torch.logspace(-5, 0, 50, dtype=torch.float64)
    _, L = Diffusion(process, schedule, matching=matching, factor=factor).marginal(t)
    assert (torch.linalg.eigvalsh(L @ L.mT) > 0).all()
    assert not (L[:, 0, 1] if factor is Factor.lower else L[:, 1, 0]).any()
    assert (L.diagonal(dim1=1, dim2=2) > 0).all()


def test_cld_is_psld_without_friction_on_x() -> None:
    cld = PROCESSES.build({"name": "cld"}, IO)
    psld = PROCESSES.build({"name": "psld", "gamma": 0.0, "nu": 4.0}, IO)
    for name in ("D", "Q", "S_inf", "S_0"):
        np.testing.assert_array_equal(getattr(cld, name), getattr(psld, name))


@pytest.mark.parametrize(("gamma", "nu"), [(0.01, 4.01), (0.0, 4.0), (0.3, 2.5)])
def test_psld_has_the_papers_closed_form(gamma: float, nu: float) -> None:
    """With d = nu - gamma and s = nu + gamma: Phi = exp(-sB/4) [[1 + dB/4, d^2 B/8], [-B/2, 1 - dB/4]]."""
    process = PROCESSES.build({"name": "psld", "gamma": gamma, "nu": nu}, IO)
    diffusion = Diffusion(process, SCHEDULES.build({"name": "constant"}, IO))
    for t in (1e-6, 0.01, 0.5, 1.0):
        B, d, s = 8.0 * t, nu - gamma, nu + gamma
        Phi = math.exp(-s * B / 4) * np.array([[1 + d * B / 4, d**2 * B / 8], [-B / 2, 1 - d * B / 4]])
        np.testing.assert_allclose(diffusion.marginal(t)[0][0], Phi, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["psld", "cld"])
@pytest.mark.parametrize("t", [1e-3, 0.3, 1.0])
def test_hsm_is_dsm_marginalized_over_the_momentum(name: str, t: float) -> None:
    process, schedule = PROCESSES.build({"name": name}, IO), SCHEDULES.build({"name": "constant"}, IO)
    Phi, L_hsm = Diffusion(process, schedule, matching=Matching.hsm).marginal(t)
    Phi_dsm, L_dsm = Diffusion(process, schedule, matching=Matching.dsm).marginal(t)
    S_0 = torch.from_numpy(process.S_0)
    torch.testing.assert_close(Phi, Phi_dsm, rtol=0, atol=0)
    torch.testing.assert_close(L_hsm @ L_hsm.mT, L_dsm @ L_dsm.mT + Phi @ S_0 @ Phi.mT, rtol=1e-10, atol=1e-14)
    # and the momentum that dsm starts from has that covariance
    dsm = Diffusion(process, schedule, matching=Matching.dsm)
    x0 = torch.zeros(1, 50_000, 1, 1, dtype=torch.float64)
    m0 = dsm.initial_state(x0, draw(0, 1, 100_000, 1, 1))[:, 50_000:]
    assert m0.var().item() == pytest.approx(process.S_0[1, 1], rel=0.03)


@pytest.mark.parametrize("k", [2, 3])
def test_backward_is_bayes_rule_for_stationary_states(k: int) -> None:
    diffusion = momentum(1, k)
    (Phi, S), (back, S_back) = diffusion.transition(0.2, 0.6), diffusion.stationary_reverse_kernel(0.2, 0.6)
    gain = diffusion.S_inf @ Phi.mT @ torch.linalg.inv(Phi @ diffusion.S_inf @ Phi.mT + S)
    torch.testing.assert_close(back, gain, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(S_back, diffusion.S_inf - gain @ Phi @ diffusion.S_inf, rtol=1e-9, atol=1e-11)


def test_the_propagator_goes_both_ways() -> None:
    diffusion = momentum(2)
    forward, back = (diffusion.propagator(torch.tensor([h], dtype=torch.float64)) for h in (0.7, -0.7))
    torch.testing.assert_close(forward @ back, torch.eye(2, dtype=torch.float64)[None], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "factor", "matching", "predicted"),
    [
        ("psld", "lower", "hsm", (0, 1)),
        ("cld", "lower", "hsm", (1,)),
        ("cld", "lower", "dsm", (0, 1)),
        ("cld", "upper", "hsm", (0, 1)),
        ("vp", "lower", "hsm", (0,)),
    ],
)
def test_a_network_predicts_only_what_the_score_needs(name: str, factor: str, matching: str, predicted: tuple) -> None:
    process, schedule = PROCESSES.build({"name": name}, IO), SCHEDULES.build({"name": "constant"}, IO)
    assert (
        Diffusion(process, schedule, matching=Matching(matching), factor=Factor(factor)).predicted_components
        == predicted
    )


def test_noise_on_x_alone_needs_its_component_alone() -> None:
    """PSLD with nu = 0 and the upper factor."""
    process = PROCESSES.build({"name": "psld", "gamma": 4.0, "nu": 0.0}, IO)
    diffusion = Diffusion(process, SCHEDULES.build({"name": "constant"}, IO), factor=Factor.upper)
    assert diffusion.predicted_components == (0,)
    x0, eps = draw(0, 3, 2, 2, 2), draw(1, 3, 4, 2, 2)
    t = torch.tensor([0.01, 0.4, 1.0], dtype=torch.float64)
    u = diffusion.perturb(diffusion.initial_state(x0), t, eps)
    torch.testing.assert_close(diffusion.complete_eps(u, t, eps[:, :2]), eps, rtol=0, atol=1e-9)


def test_the_missing_component_follows_from_the_predicted_one() -> None:
    process, schedule = PROCESSES.build({"name": "cld"}, IO), SCHEDULES.build({"name": "constant"}, IO)
    diffusion = Diffusion(process, schedule)
    x0, eps = draw(0, 4, 3, 2, 2), draw(1, 4, 6, 2, 2)
    t = torch.tensor([1e-4, 0.01, 0.4, 1.0], dtype=torch.float64)
    u = diffusion.perturb(diffusion.initial_state(x0), t, eps)
    torch.testing.assert_close(diffusion.complete_eps(u, t, eps[:, 3:]), eps, rtol=0, atol=1e-8)


@pytest.mark.parametrize("k", [1, 2])
def test_eps_follows_a_change_of_x0(k: int) -> None:
    diffusion = momentum(k=k) if k > 1 else vp("cosine")
    t, x0, change = torch.tensor([0.1, 0.8], dtype=torch.float64), *draw(3, 2, 2, 1, 2, 2)
    eps = draw(4, 2, k, 2, 2)
    u = diffusion.perturb(diffusion.initial_state(x0), t, eps)
    moved = diffusion.shift_eps(change, t, eps)
    torch.testing.assert_close(diffusion.perturb(diffusion.initial_state(x0 + change), t, moved), u, rtol=0, atol=1e-11)


@pytest.mark.parametrize("matching", list(Matching))
@pytest.mark.parametrize("k", [1, 2])
def test_eps_of_standard_normal_data(k: int, matching: Matching) -> None:
    """Against the mixture of one standard normal component, whose score is found by differentiating its density."""
    diffusion = Diffusion(
        random_process(5, k) if k > 1 else PROCESSES.build({"name": "vp"}, IO),
        SCHEDULES.build({"name": "cosine"}, IO),
        matching=matching,
    )
    u, t = draw(6, 3, k, 2, 2), torch.tensor([0.05, 0.5, 1.0], dtype=torch.float64)
    Phi, L = diffusion.marginal(t)
    start = (
        torch.from_numpy(np.array(diffusion.process.S_0)) if matching is Matching.dsm else torch.zeros(k, k).double()
    )
    start[0, 0] = 1.0
    covariance = Phi @ start @ Phi.mT + L @ L.mT
    score = -torch.einsum("bij,bjhw->bihw", torch.linalg.inv(covariance), u)
    torch.testing.assert_close(
        diffusion.score_from_eps(diffusion.eps_for_normal_data(u, t), t), score, rtol=0, atol=1e-10
    )


def test_the_process_of_the_docs_works() -> None:
    """docs/diffusion.md, "Your own process", as it stands there."""
    text = (ROOT / "docs" / "diffusion.md").read_text(encoding="utf-8")
    block = text.partition("```python\n")[2].partition("```")[0]
    kept: dict[str, type[Process]] = {}

    class Registrar:  # in place of PROCESSES, which other tests go through
        @staticmethod
        def register(name: str) -> Callable[[type[Process]], type[Process]]:
            return lambda cls: kept.setdefault(name, cls)

    names = {"PROCESSES": Registrar, "Process": Process, "ComponentConfig": ComponentConfig, "Shapes": Shapes}
    exec(block, names | {"dataclass": dataclass, "np": np, "__name__": __name__})
    process = kept["mine"](kept["mine"].Config(name="mine"), IO)
    assert_solves_lyapunov(Diffusion(process, SCHEDULES.build({"name": "linear"}, IO)), 0.4)


def test_momentum_and_an_endless_clock_are_refused() -> None:
    with pytest.raises(UserError, match=r"process=psld.*schedule=flow"):
        Diffusion(PROCESSES.build({"name": "psld"}, IO), SCHEDULES.build({"name": "flow"}, IO))


@pytest.mark.parametrize(
    "fields", [{"gamma": -0.1}, {"nu": -1.0}, {"gamma": 2.0, "nu": 2.0}, {"kappa": 0.0}, {"kappa": -1.0}]
)
def test_psld_refuses(fields: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"process\.\w+="):
        PROCESSES.build({"name": "psld", **fields}, IO)


def test_k2_covariance_keeps_its_digits_near_t_0() -> None:
    """Noise enters the momentum only, so x has a variance of order B^3: the plain difference would lose it."""
    D, S_inf = np.diag([0.0, 0.5]), np.diag([1.0, 0.25])
    Q = np.array([[0.0, -0.5], [0.5, 0.0]])
    schedule = SCHEDULES.build({"name": "ddpm_linear"}, IO)
    diffusion = Diffusion(Matrices(D, Q, S_inf), schedule, matching=Matching.dsm)
    _, L = diffusion.marginal(1e-3)
    with mpmath.workdps(40):
        B = mpmath.mpf(-mpmath.log1p(mpmath.mpf("-0.0001")))
        Phi = mpmath.expm(mpmath.matrix((-(D + Q) @ np.linalg.inv(S_inf)).tolist()) * B)
        S = mpmath.matrix(S_inf.tolist())
        S = S - Phi * S * Phi.T
    assert (L[0, 0, 0] ** 2).item() == pytest.approx(float(S[0, 0]), rel=1e-9, abs=0)


@pytest.mark.parametrize("factor", list(Factor))
def test_k2_score_is_the_gradient_of_the_log_density(factor: Factor) -> None:
    """-S^-1 (u - mean), whatever the factor, though eps is not the same."""
    diffusion, t = momentum(factor=factor), torch.tensor([0.2, 0.7], dtype=torch.float64)
    u0, eps = draw(1, 2, 2, 6, 2, 2)
    u = diffusion.perturb(u0, t, eps).requires_grad_()
    Phi, L = diffusion.marginal(t)
    parts, parts0 = (state.unflatten(1, (2, 3)) for state in (u, u0))  # (B, k, C, H, W)
    residual = parts - torch.einsum("bij,bjchw->bichw", Phi, parts0)
    precision = torch.linalg.inv(L @ L.mT)
    log_density = -0.5 * torch.einsum("bichw,bij,bjchw->", residual, precision, residual)
    (gradient,) = torch.autograd.grad(log_density, u)
    torch.testing.assert_close(diffusion.score_from_eps(eps, t), gradient, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(diffusion.eps_from_score(gradient, t), eps, rtol=1e-9, atol=1e-9)


def test_k2_x0_is_the_first_component() -> None:
    diffusion, t = momentum(), torch.tensor([0.2, 0.7], dtype=torch.float64)
    u0, eps = diffusion.initial_state(draw(2, 2, 3, 2, 2)), draw(3, 2, 6, 2, 2)
    x0 = diffusion.x0_from_eps(diffusion.perturb(u0, t, eps), t, eps)
    torch.testing.assert_close(x0, u0[:, :3], rtol=0, atol=1e-10)


@pytest.mark.parametrize("factor", list(Factor))
@pytest.mark.parametrize("matching", list(Matching))
def test_k2_x0_of_the_expected_noise_is_the_expected_image(matching: Matching, factor: Factor) -> None:
    """For x0 ~ N(0, 1), of which E[x0 | u] = p^T cov(u)^-1 u; and so after eps has followed a change of x0."""
    diffusion, t = momentum(matching=matching, factor=factor), torch.tensor([0.02, 0.3, 1.0], dtype=torch.float64)
    u, change = draw(4, 3, 2, 2, 2), draw(5, 3, 1, 2, 2)
    column, S = hybrid(diffusion, t)
    expected = apply_matrix((torch.linalg.inv(S + column @ column.mT) @ column).mT, u)
    eps = diffusion.eps_for_normal_data(u, t)
    torch.testing.assert_close(diffusion.x0_from_eps(u, t, eps), expected, rtol=0, atol=1e-10)
    moved = diffusion.x0_from_eps(u, t, diffusion.shift_eps(change, t, eps))
    torch.testing.assert_close(moved, expected + change, rtol=0, atol=1e-8)


@pytest.mark.parametrize("factor", list(Factor))
@pytest.mark.parametrize("matching", list(Matching))
def test_k2_eps_is_mended_where_no_image_explains_it(matching: Matching, factor: Factor) -> None:
    """The expected eps is left alone; an error in it ends up in x0 alone, as large as it was there."""
    diffusion, t = momentum(matching=matching, factor=factor), torch.tensor([0.02, 0.3, 1.0], dtype=torch.float64)
    u, error = draw(6, 3, 2, 2, 2), draw(7, 3, 2, 2, 2)
    eps = diffusion.eps_for_normal_data(u, t)
    torch.testing.assert_close(diffusion.project_eps(u, t, eps), eps, rtol=0, atol=1e-9)
    mended, x0 = diffusion.project_eps(u, t, eps + error), diffusion.x0_from_eps(u, t, eps + error)
    torch.testing.assert_close(diffusion.x0_from_eps(u, t, mended), x0, rtol=1e-7, atol=1e-7)
    column, S = hybrid(diffusion, t)
    score = apply_matrix(torch.linalg.inv(S), apply_matrix(column, x0) - u)
    torch.testing.assert_close(diffusion.score_from_eps(mended, t), score, rtol=1e-7, atol=1e-7)
    if matching is Matching.hsm:  # eps is white given x0: the nearest one is taken
        assert torch.all((mended - eps).flatten(1).norm(dim=1) < error.flatten(1).norm(dim=1))


def hybrid(diffusion: Diffusion, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(p, S) of q(u_t | x0) = N(p x0, S)."""
    Phi, L = diffusion.with_hsm.marginal(t)
    return Phi[:, :, :1], L @ L.mT


@pytest.mark.parametrize("name", ["psld", "cld"])
def test_k2_x0_bears_errors_of_eps_as_well_as_any_estimate_can(name: str) -> None:
    """Gauss and Markov: no linear estimate that is right for exact eps has less variance than 1 / (p^T S^-1 p)."""
    diffusion = Diffusion(PROCESSES.build({"name": name}, IO), SCHEDULES.build({"name": "constant"}, IO))
    for t in (0.01, 0.2, 1.0):
        one, zero = torch.eye(2, dtype=torch.float64).reshape(2, 2, 1, 1), torch.zeros(2, 2, 1, 1, dtype=torch.float64)
        counts = diffusion.x0_from_eps(zero, t, one).norm().item()
        column, S = hybrid(diffusion, torch.tensor([t], dtype=torch.float64))
        assert counts == pytest.approx((column.mT @ torch.linalg.solve(S, column)).rsqrt().item(), rel=1e-9)
        Phi, L = diffusion.marginal(t)
        naive = (torch.linalg.inv(Phi)[:, :1] @ L).norm().item()
        assert counts <= naive * (1 + 1e-9)
        if t == 1.0:
            assert naive > 100 * counts


def test_k2_prior_has_the_stationary_covariance() -> None:
    process = random_process(3)
    u = momentum(3).sample_prior(draw(3, 1, 2 * 50_000, 1, 1)).reshape(2, -1)
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
