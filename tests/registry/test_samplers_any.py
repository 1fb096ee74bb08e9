"""Samplers of any linear process: recursions of Gaussian data, psld's figures, processes of one's own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from closed_forms import Mixture, diffusion, normal
from linear_gaussian import CASES, MEAN, VARIANCE, Numbers, build
from scipy.linalg import expm

from dvae.diffusion.kernels import Diffusion
from dvae.diffusion.time_grid import Spacing, time_grid
from dvae.errors import UserError


def affine(name: str, d: Diffusion, **fields) -> tuple[float, float]:
    """Mean and variance of the image that the sampler makes of Gaussian data, exactly, from what it does to zero, to a
    start of 1 in each component, and to a noise of 1 in each component of each number."""
    draws = [] if name in ("deis", "ode") else range({"em": 1, "sscs": 2}[name] * fields["steps"])
    starts = torch.zeros(1 + d.k * (1 + len(draws)), d.k, 1, 1, dtype=torch.float64)
    starts[1 : 1 + d.k, :, 0, 0] = torch.eye(d.k, dtype=torch.float64)

    def noise(i: int) -> torch.Tensor:
        unit = torch.zeros_like(starts)
        unit[1 + d.k * (1 + i) :, :, 0, 0][: d.k] = torch.eye(d.k, dtype=torch.float64)
        return unit

    end = build(name, d.k, **fields).sample(Mixture(d, (MEAN,), (VARIANCE,)), d.sample_prior(starts), noise).u
    assert not end[:, 1:].any()
    response = (end[1:] - end[0])[:, 0]
    return end[0, 0].item(), response.square().sum().item()


# -- the same in NumPy --

Moments = tuple[np.ndarray, np.ndarray]


def em_step(n: Numbers, now: Moments, t: float, s: float) -> Moments:
    dB, (G, g) = n.B(t) - n.B(s), n.score(n.B(t))
    R = np.eye(n.k) + dB * (-n.A + 2 * n.D @ G)
    return R @ now[0] + dB * 2 * n.D @ g, R @ now[1] @ R.T + 2 * dB * n.D


def sscs_step(n: Numbers, now: Moments, t: float, s: float) -> Moments:
    def relax(now: Moments, dB: float) -> Moments:
        P = expm(n.A_back * dB)
        return P @ now[0], P @ now[1] @ P.T + n.S_inf - P @ n.S_inf @ P.T

    middle, (G, g) = n.B((t + s) / 2), n.score(n.B(t))
    mean, covariance = relax(now, n.B(t) - middle)
    push = (n.B(t) - n.B(s)) * 2 * n.D
    R = np.eye(n.k) + push @ (G + n.inv)
    return relax((R @ mean + push @ g, R @ covariance @ R.T), middle - n.B(s))


STEPS: dict[str, Callable[[Numbers, Moments, float, float], Moments]] = {"em": em_step, "sscs": sscs_step}


def recursion(name: str, d: Diffusion, steps: int, spacing: str = "uniform", t_min: float = 0.0) -> tuple[float, float]:
    """Mean and variance of the image, step by step."""
    n = Numbers(d)
    now = np.zeros(n.k), n.S_inf
    times = time_grid(d.schedule, steps, Spacing[spacing], t_min)
    for t, s in pairwise(times[:-1]):
        now = STEPS[name](n, now, t, s)
    G, g = n.x0(n.B(times[-2]))
    return (G @ now[0] + g).item(), (G @ now[1] @ G.T).item()


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("case", CASES)
def test_follows_its_recursion(name: str, case: str) -> None:
    d = CASES[case]
    np.testing.assert_allclose(affine(name, d, steps=12), recursion(name, d, 12), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", STEPS)
def test_follows_its_recursion_on_another_grid(name: str) -> None:
    found = affine(name, CASES["psld"], steps=51, spacing="quadratic", t_min=1e-5)
    np.testing.assert_allclose(found, recursion(name, CASES["psld"], 51, "quadratic", 1e-5), rtol=1e-8)


FIGURES = {
    ("em", "uniform"): (0.2805, 0.2553),
    ("em", "quadratic"): (0.2660, 0.2537),
    ("sscs", "uniform"): (0.2294, 0.2449),
    ("sscs", "quadratic"): (0.2416, 0.2478),
}
"""Variance of x after 50 and 200 steps on psld, gamma = 0.01, beta = 8, data of variance 0.25."""


def published_grid(steps: int, spacing: str) -> list[float]:
    """Of the figures: `steps` steps to 1e-5 by t = 1e-5 + (1 - 1e-5) share^p; the denoising step comes after them."""
    share = np.linspace(1, 0, steps + 1)
    return (1e-5 + (1 - 1e-5) * share ** {"uniform": 1, "quadratic": 2}[spacing]).tolist()


@pytest.mark.parametrize(("name", "spacing"), FIGURES)
@pytest.mark.parametrize("i", [0, 1])
def test_figures(name: str, spacing: str, i: int) -> None:
    n, steps = Numbers(CASES["psld"]), (50, 200)[i]
    now = np.zeros(2), n.S_inf
    for t, s in pairwise(published_grid(steps, spacing)):
        now = STEPS[name](n, now, t, s)
    figure = FIGURES[name, spacing][i]
    assert now[1][0, 0] == pytest.approx(figure, abs=5.1e-5)
    # our grid with as many steps is even in sqrt(t) down to t_min itself, hence a little finer near the data
    assert recursion(name, CASES["psld"], steps + 1, spacing, 1e-5)[1] == pytest.approx(figure, abs=8e-5)


@pytest.mark.parametrize("case", ["psld", "cld"])
@pytest.mark.parametrize(
    ("spacing", "steps"), [("uniform", 50), ("uniform", 100), ("quadratic", 50), ("quadratic", 100), ("quadratic", 200)]
)
def test_splitting_beats_euler_at_equal_nfe(case: str, spacing: str, steps: int) -> None:
    """In the variance; on the uniform grid the two meet near 200 steps."""
    em, sscs = (abs(recursion(name, CASES[case], steps, spacing, 1e-5)[1] - VARIANCE) for name in ("em", "sscs"))
    assert sscs < em


@pytest.mark.parametrize("case", ["vp linear", "psld", "cld"])
@pytest.mark.parametrize("name", STEPS)
def test_variance_converges_at_order_1(name: str, case: str) -> None:
    """On the quadratic grid, t_min = 1e-5, from 200 to 800 steps."""
    error = [abs(recursion(name, CASES[case], n, "quadratic", 1e-5)[1] - VARIANCE) for n in (200, 400, 800)]
    np.testing.assert_allclose(np.log2(np.divide(error[:-1], error[1:])), 1.0, atol=0.1)


@pytest.mark.parametrize("case", ["underdamped", "third order"])
@pytest.mark.parametrize(
    ("name", "fields", "tolerance"),
    [
        ("em", {"steps": 400, "spacing": "quadratic"}, 0.03),
        ("sscs", {"steps": 400, "spacing": "quadratic"}, 0.03),
        ("deis", {"steps": 120, "t_min": 1e-5}, 0.005),
        ("ode", {"tolerance": 1e-4, "t_min": 1e-5}, 0.005),
    ],
)
def test_recovers_mean_and_variance_of_a_process_of_ones_own(
    case: str, name: str, fields: dict, tolerance: float
) -> None:
    if name in STEPS:  # which the sampler follows, above
        mean, variance = recursion(name, CASES[case], fields["steps"], fields["spacing"])
    else:
        mean, variance = affine(name, CASES[case], **fields)
    assert mean == pytest.approx(MEAN, rel=tolerance)
    assert variance == pytest.approx(VARIANCE, rel=tolerance)


@pytest.mark.parametrize("name", STEPS)
def test_monte_carlo_of_two_modes(name: str) -> None:
    d, n = CASES["psld"], 4000
    model = Mixture(d, (-0.6, 0.5), (0.01, 0.04), (0.4, 0.6))
    end = build(name, 2, steps=60, spacing="quadratic").sample(
        model, d.sample_prior(normal(0, n, 2, 1, 1)), lambda i: normal(1 + i, n, 2, 1, 1)
    )
    x = end.u[:, 0]
    assert x.mean().item() == pytest.approx(model.mean, abs=0.04)
    assert x.var().item() == pytest.approx(model.variance, rel=0.06)
    assert (x < -0.1).double().mean().item() == pytest.approx(0.4 + 0.6 * 0.0013, abs=0.04)


def test_splitting_asks_for_the_times_of_the_grid_alone() -> None:
    """A table's network knows no others."""
    d = CASES["vp ddpm_linear"]
    model = Mixture(d)
    build("sscs", steps=7).sample(model, normal(0, 1, 1, 1, 1), lambda i: normal(i, 1, 1, 1, 1))
    assert model.calls == time_grid(d.schedule, 7, Spacing.uniform)[:-1]


# -- refusals --


@pytest.mark.parametrize("name", ["em", "sscs", "deis", "ode"])
def test_supports_every_process_on_a_clock_that_ends(name: str) -> None:
    assert all(build(name, d.k).supports(d) for d in CASES.values())
    assert not build(name).supports(diffusion("vp", "flow"))


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("deis", {"order": 4}, r"sampler\.order=4"),
        ("ode", {"tolerance": 0.0}, r"sampler\.tolerance=0"),
        ("ode", {"t_min": 0.0}, r"sampler\.t_min=0"),
        ("em", {"steps": 0}, r"sampler\.steps=0"),
    ],
)
def test_refuses(name: str, fields: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(name, **fields)
