"""High-order samplers (k = 1) against exact flows, and published algorithms written here once more.

Data are a Gaussian or a mixture of three, with their exact denoiser, in float64, threshold none.
"""

from __future__ import annotations

import math
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch
from closed_forms import IO, Mixture, affine, diffusion, normal
from scipy.optimize import brentq
from scipy.special import ndtr
from scipy.stats import norm

from dvae.diffusion.time_grid import Spacing, time_grid
from dvae.registry.samplers.base import SAMPLERS
from dvae.registry.samplers.unipc import weights

ONE = {"means": (0.3,), "variances": (0.25,), "weights": (1.0,)}
THREE = {"means": (-0.8, 0.1, 0.7), "variances": (0.02, 0.05, 0.03), "weights": (0.3, 0.5, 0.2)}
STARTS = np.linspace(-2.2, 2.2, 12)


def sampler(name: str, **fields):
    return SAMPLERS.build({"name": name, "threshold": "none", **fields}, IO)


def no_noise(i: int) -> torch.Tensor:
    raise AssertionError("a deterministic sampler draws no noise")


def states(model: Mixture, name: str, noise=no_noise, starts: np.ndarray = STARTS, **fields) -> dict[float, np.ndarray]:
    """The states met, by time."""
    met: dict[float, np.ndarray] = {}

    def keep(i: int, t: float, u: torch.Tensor) -> torch.Tensor:
        met[t] = u.flatten().numpy()
        return u

    sampler(name, **fields).sample(model, torch.from_numpy(starts).reshape(-1, 1, 1, 1), noise, keep)
    return met


def denoise(w: np.ndarray, r: float, data: dict) -> np.ndarray:
    """E[x0 | w = x0 + r eps], by Bayes' rule, as EDM writes it: apart from dvae."""
    means, variances, shares = (np.array(data[key])[:, None] for key in ("means", "variances", "weights"))
    total = variances + r**2
    likely = shares * norm.pdf(w, means, np.sqrt(total))
    return (likely * (variances * w + r**2 * means) / total).sum(0) / likely.sum(0)


def ratio(model: Mixture, t: float) -> float:
    """r = sigma/alpha, from the clock alone."""
    return math.sqrt(math.expm1(model.diffusion.schedule.integral(torch.tensor(t, dtype=torch.float64)).item()))


# -- orders of convergence --


def exact_flow(model: Mixture, starts: np.ndarray, s: float) -> np.ndarray:
    """u_s on the probability flow from u_1: in one dimension a flow keeps quantiles, F_s(u_s) = F_1(u_1)."""

    kernels = {t: [matrix.item() for matrix in model.diffusion.marginal(t)] for t in (1.0, s)}

    def tail(u: float, t: float, side: float) -> float:
        Phi, L = kernels[t]
        parts = zip(model.weights, model.means, model.variances, strict=True)
        return sum(w * ndtr(-side * (u - Phi * m) / math.sqrt(Phi**2 * v + L**2)) for w, m, v in parts)

    def follow(u: float) -> float:
        side = math.copysign(1.0, u)  # the smaller tail keeps its digits
        return brentq(lambda y: tail(y, s, side) - tail(u, 1.0, side), -8, 8, xtol=1e-15, rtol=1e-14)

    return np.array([follow(u) for u in starts])


def test_exact_flow_of_gaussian_data_is_affine() -> None:
    model, (a, b) = Mixture(diffusion("vp", "linear")), (math.exp(-0.5 * 10.05), math.exp(-0.5 * (0.03 + 9.95 * 0.09)))
    deviation = [math.sqrt(0.25 * x**2 + 1 - x**2) for x in (a, b)]
    wanted = 0.3 * b + deviation[1] / deviation[0] * (STARTS - 0.3 * a)
    np.testing.assert_allclose(exact_flow(model, STARTS, 0.3), wanted, rtol=0, atol=1e-12)


ORDERS = [
    ("ddim", {}, 1),
    ("heun", {}, 2),
    ("dpmpp_2m", {}, 2),
    ("unipc", {"order": 1}, 2),
    ("unipc", {"order": 2}, 3),
    ("unipc", {"order": 3}, 4),
]


@pytest.mark.parametrize(("name", "fields", "order"), ORDERS)
@pytest.mark.parametrize("schedule", ["linear", "flow"])
@pytest.mark.parametrize("data", [ONE, THREE], ids=["gaussian", "mixture"])
def test_order_of_convergence(name: str, fields: dict, order: int, schedule: str, data: dict) -> None:
    """Largest error at sigma/alpha = 0.02, the last time before 0, karras, from 40 to 80 steps (found: within 0.20)."""
    model, errors = Mixture(diffusion("vp", schedule), **data), []
    for steps in (41, 81):
        met = states(model, name, steps=steps, spacing="karras", sigma_min=0.02, **fields)
        t = sorted(met)[1]
        errors.append(np.abs(met[t] - exact_flow(model, STARTS, t)).max())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", ["cosine", "flow"])
def test_variance_of_the_sde_form_converges_at_order_2(schedule: str, eta: float) -> None:
    """Gaussian data, at sigma/alpha = 0.02, karras, from 40 to 80 steps (found: 2.05 to 2.08). The mean is exact."""
    model, errors = Mixture(diffusion("vp", schedule)), []
    for steps in (41, 81):
        made = sampler("dpmpp_2m", steps=steps, spacing="karras", sigma_min=0.02, eta=eta)
        t = time_grid(model.diffusion.schedule, steps, Spacing.karras, sigma_min=0.02)[-2]
        mean, variance = affine(made, model, noises=steps, at=-2)
        a = model.diffusion.alpha(t).item()
        assert mean == pytest.approx(0.3 * a, abs=1e-5)
        errors.append(variance - (0.25 * a**2 + model.diffusion.sigma(t).item() ** 2))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2.0, abs=0.2)


def test_at_few_evaluations_second_order_beats_first() -> None:
    """Mixture, linear clock, 20 evaluations, spacing quadratic: root mean square error of the images."""
    model = Mixture(diffusion("vp", "linear"), **THREE)
    starts = norm.ppf((np.arange(60) + 0.5) / 60)
    wanted = exact_flow(model, starts, 1e-9)
    error = {}
    for name in ("ddim", "dpmpp_2m", "unipc"):
        end = states(model, name, starts=starts, steps=20, spacing="quadratic")[0.0]
        error[name] = math.sqrt(np.mean((end - wanted) ** 2))
    assert max(error["dpmpp_2m"], error["unipc"]) < 0.5 * error["ddim"]


# -- published algorithms --


@pytest.mark.parametrize("data", [ONE, THREE], ids=["gaussian", "mixture"])
def test_heun_is_edms_algorithm(data: dict) -> None:
    """Karras et al. 2022, algorithm 1 with sigma(t) = t, equation 5, 18 steps; their x is u sqrt(1 + sigma^2)."""
    model, N = Mixture(diffusion("vp", "edm"), **data), 18
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    times = [(high + i / (N - 1) * (low - high)) ** 7 for i in range(N)] + [0.0]
    x = STARTS * math.sqrt(1 + 80.0**2)
    wanted = [STARTS]
    for t, t_next in pairwise(times):
        d = (x - denoise(x, t, data)) / t
        x_next = x + (t_next - t) * d
        if t_next:
            d_next = (x_next - denoise(x_next, t_next, data)) / t_next
            x_next = x + (t_next - t) * (d + d_next) / 2
        x = x_next
        wanted.append(x / math.sqrt(1 + t_next**2))
    met = states(model, "heun", steps=N)
    np.testing.assert_allclose([ratio(model, t) for t in met], times, rtol=1e-10)
    np.testing.assert_allclose(list(met.values()), wanted, rtol=0, atol=1e-10)
    assert len(model.calls) == 35


@pytest.mark.parametrize("data", [ONE, THREE], ids=["gaussian", "mixture"])
def test_ddim_on_the_flow_clock_is_eulers_rule_on_straight_paths(data: dict) -> None:
    """Liu et al. 2023: x_t = (1 - t) x0 + t eps, dx = v dt, v = E[eps - x0 | x_t]; their x is u sqrt(t^2 + (1-t)^2)."""
    model, n = Mixture(diffusion("vp", "flow"), **data), 25
    x, wanted = STARTS, {1.0: STARTS}
    for j in range(n, 0, -1):
        t, s = j / n, (j - 1) / n
        mean = sum(w * m for w, m in zip(data["weights"], data["means"], strict=True))
        x0 = denoise(x / (1 - t), t / (1 - t), data) if t < 1 else mean
        x = x - (t - s) * ((x - (1 - t) * x0) / t - x0)
        wanted[s] = x / math.sqrt(s**2 + (1 - s) ** 2)
    met = states(model, "ddim", steps=n)
    assert list(met) == list(wanted)
    np.testing.assert_allclose(list(met.values()), list(wanted.values()), rtol=0, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "ddpm_linear", "edm"])
def test_dpmpp_2m_is_the_formula_in_sigma(schedule: str, eta: float) -> None:
    """w = x0 + r eps, h = log(r_t / r_s): w_s = r_s/r_t e^(-eta h) w + (1 - e^(-h - eta h)) D, as libraries have it."""
    model, n = Mixture(diffusion("vp", schedule), **THREE), 20
    noises = normal(3, n, len(STARTS), 1, 1, 1)
    r = [ratio(model, t) for t in time_grid(model.diffusion.schedule, n, Spacing.karras)]
    w, before, wanted = STARTS * math.sqrt(1 + r[0] ** 2), None, [STARTS]
    for i in range(n):
        x0 = denoise(w, r[i], THREE)
        if i == n - 1:
            w = x0
        else:
            h = math.log(r[i] / r[i + 1])
            D = x0
            if before is not None:
                share = h / math.log(r[i - 1] / r[i])
                D = (1 + share / 2) * x0 - share / 2 * before
            w = r[i + 1] / r[i] * math.exp(-eta * h) * w + (1 - math.exp(-h - eta * h)) * D
            w = w + r[i + 1] * math.sqrt(1 - math.exp(-2 * eta * h)) * noises[i].flatten().numpy()
        before = x0
        wanted.append(w / math.sqrt(1 + r[i + 1] ** 2))
    met = states(model, "dpmpp_2m", noises.__getitem__, steps=n, spacing="karras", eta=eta)
    np.testing.assert_allclose(list(met.values()), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "edm"])
def test_unipc_is_the_published_algorithm(schedule: str, order: int) -> None:
    """Zhao et al. 2023 in their order: predict, evaluate, correct; with R_p(h) a_p = phi_p(h) / B(h)."""
    model, n = Mixture(diffusion("vp", schedule), **THREE), 15
    times = time_grid(model.diffusion.schedule, n, Spacing.log_snr)
    r = [ratio(model, t) for t in times]
    lambdas = [-math.log(x) for x in r[:-1]]
    alpha, sigma = [1 / math.sqrt(1 + x**2) for x in r], [x / math.sqrt(1 + x**2) for x in r]

    def step(u: np.ndarray, i: int, x0s: list[np.ndarray], p: int) -> np.ndarray:
        """UniP-p where x0s end at times[i - 1], UniC-p where they go on to times[i]."""
        h, base = lambdas[i] - lambdas[i - 1], i - 1
        chosen = [base - m for m in range(1, p)] + ([i] if len(x0s) > i else [])
        u = sigma[i] / sigma[base] * u - alpha[i] * math.expm1(-h) * x0s[base]
        if not chosen:
            return u
        steps = np.array([(lambdas[m] - lambdas[base]) / h for m in chosen])
        B = math.expm1(-h)
        phi, b = (math.expm1(-h) / -h - 1), []
        for m in range(1, len(chosen) + 1):
            b.append(phi * math.factorial(m) / B)
            phi = phi / -h - 1 / math.factorial(m + 1)
        a = np.linalg.solve(np.array([steps**m for m in range(len(chosen))]), b) if len(chosen) > 1 else [0.5]
        return u - alpha[i] * B * sum(c / s * (x0s[m] - x0s[base]) for c, s, m in zip(a, steps, chosen, strict=True))

    u, x0s, predicted = STARTS, [], [STARTS]
    for i in range(1, n):
        x0s.append(denoise(predicted[-1] / alpha[i - 1], r[i - 1], THREE))
        if i > 1:
            u = step(u, i - 1, x0s, min(order, i - 1))
        predicted.append(step(u, i, x0s, min(order, i)))
    predicted.append(denoise(predicted[-1] / alpha[n - 1], r[n - 1], THREE))
    met = states(model, "unipc", steps=n, spacing="log_snr", order=order)
    np.testing.assert_allclose(list(met.values()), predicted, rtol=0, atol=1e-10)
    assert len(model.calls) == n


@pytest.mark.parametrize("h", [1e-6, 1e-2, 1.0, 30.0])
@pytest.mark.parametrize("at", [(-1.0, 1.0), (-2.5, -1.0), (-1.7, -0.6, 1.0)])
def test_unipcs_weights_integrate_powers(h: float, at: tuple[float, ...]) -> None:
    """sum_j w_j at_j^k = integral of h e^(-h (1 - r)) r^k over [0, 1], against 30 digits."""
    with mpmath.workdps(30):
        wanted = [
            float(mpmath.quad(lambda r, k=k: h * mpmath.exp(-h * (1 - r)) * r**k, [0, 0.8, 1]))
            for k in range(1, len(at) + 1)
        ]
    found = [sum(w * x**k for w, x in zip(weights(h, list(at)), at, strict=True)) for k in range(1, len(at) + 1)]
    assert found == pytest.approx(wanted, rel=1e-12)


# -- Gaussian data: the samplers' own linear recursions, by hand --


@pytest.mark.parametrize("schedule", ["ddpm_linear", "cosine"])
def test_heun_obeys_its_linear_recursion(schedule: str) -> None:
    model = Mixture(diffusion("vp", schedule))
    r = [ratio(model, t) for t in time_grid(model.diffusion.schedule, 30, Spacing.karras)]
    gain = math.sqrt(1 + r[0] ** 2)  # of w - mean, where w = u / alpha
    offset = -0.3
    for t, s in pairwise(r[:-1]):
        slope_t, slope_s = t / (0.25 + t**2), s / (0.25 + s**2)  # eps is slope (w - mean)
        factor = 1 + (s - t) / 2 * (slope_t + slope_s * (1 + (s - t) * slope_t))
        gain, offset = gain * factor, offset * factor
    last = 0.25 / (0.25 + r[-2] ** 2)
    mean, variance = affine(sampler("heun", steps=30), model, noises=0)
    assert mean == pytest.approx(0.3 + offset * last, abs=1e-10)
    assert variance == pytest.approx((gain * last) ** 2, rel=1e-8)


@pytest.mark.parametrize("schedule", ["ddpm_linear", "cosine"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_dpmpp_2m_obeys_its_covariance_recursion(schedule: str, eta: float) -> None:
    """Of (w - mean, the last x0 - mean), 2 x 2, by the formula in sigma."""
    model = Mixture(diffusion("vp", schedule))
    r = [ratio(model, t) for t in time_grid(model.diffusion.schedule, 30, Spacing.quadratic)]
    mean, C = np.array([-0.3, 0.0]), np.diag([1 + r[0] ** 2, 0.0])
    for i, (t, s) in enumerate(pairwise(r[:-1])):
        h, shrink = math.log(t / s), 0.25 / (0.25 + t**2)
        share = h / math.log(r[i - 1] / t) / 2 if i else 0.0
        weight = 1 - math.exp(-(1 + eta) * h)
        J = np.array([[s / t * math.exp(-eta * h) + weight * (1 + share) * shrink, -weight * share], [shrink, 0.0]])
        mean, C = J @ mean, J @ C @ J.T
        C[0, 0] += s**2 * (1 - math.exp(-2 * eta * h))
    last = 0.25 / (0.25 + r[-2] ** 2)
    found = affine(sampler("dpmpp_2m", steps=30, spacing="quadratic", eta=eta), model, noises=30)
    assert found[0] == pytest.approx(0.3 + last * mean[0], abs=1e-10)
    assert found[1] == pytest.approx(last**2 * C[0, 0], rel=1e-8)


def test_first_steps_are_ddims() -> None:
    """Two steps: from t = 1 and to t = 0. dpmpp_2m with eta = 1 is then ddim with eta = 1, and so is DDPM."""
    for schedule in ("cosine", "flow"):
        model = Mixture(diffusion("vp", schedule), **THREE)
        for name, fields in (("dpmpp_2m", {}), ("unipc", {}), ("dpmpp_2m", {"eta": 1.0})):
            noise = normal(5, len(STARTS), 1, 1, 1)
            found = states(model, name, lambda i, noise=noise: noise, steps=2, spacing="uniform", **fields)
            eta = fields.get("eta", 0.0)
            wanted = states(model, "ddim", lambda i, noise=noise: noise, steps=2, spacing="uniform", eta=eta)
            np.testing.assert_allclose(found[0.5], wanted[0.5], rtol=0, atol=1e-10)


def test_heun_starts_with_ddims_step_where_sigma_over_alpha_is_infinite() -> None:
    model = Mixture(diffusion("vp", "flow"), **THREE)
    found, wanted = (states(model, name, steps=4, spacing="uniform") for name in ("heun", "ddim"))
    np.testing.assert_allclose(found[0.75], wanted[0.75], rtol=0, atol=1e-12)
    assert len(model.calls) == 6 + 4
