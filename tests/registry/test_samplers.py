"""DDPM and DDIM on Gaussian data, whose denoiser is known: the whole sampler is then an affine map of its noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dvae.diffusion import Diffusion, Prediction
from dvae.errors import UserError
from dvae.registry import PROCESSES, SAMPLERS, SCHEDULES, Shapes
from dvae.registry.processes import Process
from dvae.timegrid import Spacing, time_grid

IO = Shapes(image_size=1, channels=1)
MEAN, VARIANCE = 0.3, 0.25


def build_diffusion(schedule: str, **fields: float) -> Diffusion:
    return Diffusion(PROCESSES.build({"name": "vp"}, IO), SCHEDULES.build({"name": schedule, **fields}, IO))


def sampler(name: str, **fields):
    return SAMPLERS.build({"name": name, "clip_x0": False, **fields}, IO)


class GaussianDenoiser:
    """The exact denoiser of data ~ N(MEAN, VARIANCE), pixel by pixel: E[x0 | u_t]."""

    def __init__(self, diffusion: Diffusion) -> None:
        self.diffusion = diffusion
        self.calls: list[float] = []

    def __call__(self, u: torch.Tensor, t: float, *, clip: bool = False) -> Prediction:
        self.calls.append(t)
        a, v = self.diffusion.alpha(t).item(), self.diffusion.sigma(t).item() ** 2
        x0 = MEAN + a * VARIANCE / (a**2 * VARIANCE + v) * (u - a * MEAN)
        if clip:
            x0 = x0.clamp(-1.0, 1.0)
        eps = self.diffusion.eps_from_x0(u, t, x0)
        return Prediction(eps, x0, self.diffusion.score_from_eps(eps, t))


def affine(name: str, diffusion: Diffusion, **fields) -> tuple[float, float]:
    """Mean and variance of the sampler's output, exactly: its response to u = 0, to u = 1 and to each step's noise."""
    steps = fields["steps"]
    u = torch.zeros(steps + 2, 1, 1, 1, dtype=torch.float64)
    u[1] = 1.0

    def noise(i: int) -> torch.Tensor:
        unit = torch.zeros_like(u)
        unit[2 + i] = 1.0
        return unit

    out = sampler(name, **fields).sample(GaussianDenoiser(diffusion), u, noise).u.flatten()
    return out[0].item(), ((out[1:] - out[0]) ** 2).sum().item()


def no_noise(i: int) -> torch.Tensor:
    raise AssertionError("a deterministic sampler draws no noise")


def levels(diffusion: Diffusion, steps: int, spacing: Spacing = Spacing.uniform) -> Iterator[tuple[float, float]]:
    """(abar_t, abar_s) of every step, from the clock alone."""
    times = torch.tensor(time_grid(diffusion.schedule, steps, spacing), dtype=torch.float64)
    abar = torch.exp(-diffusion.schedule.integral(times)).tolist()
    return pairwise(abar)


# -- the grid of times --


@given(st.integers(1, 1200), st.sampled_from(list(Spacing)), st.sampled_from([1, 7, 100, 1000]))
def test_grid_has_distinct_discrete_times(steps: int, spacing: Spacing, total: int) -> None:
    grid = time_grid(SCHEDULES.build({"name": "ddpm_linear", "steps": total}, IO), steps, spacing)
    assert (grid[0], grid[-1]) == (1.0, 0.0)
    assert all(a > b for a, b in pairwise(grid))
    assert set(grid) <= {i / total for i in range(total + 1)}
    assert len(grid) == min(steps, total) + 1


@given(st.integers(1, 1200), st.sampled_from(list(Spacing)))
def test_grid_on_continuous_time(steps: int, spacing: Spacing) -> None:
    grid = time_grid(build_diffusion("cosine").schedule, steps, spacing)
    power = {Spacing.uniform: 1.0, Spacing.quadratic: 0.5}[spacing]
    np.testing.assert_allclose(np.power(grid, power), np.linspace(1, 0, steps + 1), atol=1e-12)


def test_grids_by_hand() -> None:
    schedule = build_diffusion("ddpm_linear").schedule
    assert time_grid(schedule, 4, Spacing.uniform) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert time_grid(schedule, 4, Spacing.quadratic) == [1.0, 0.562, 0.25, 0.062, 0.0]
    # rounding (j/100)^2 1000 alone would give 0, 0, 1, 2, 2, 4, ...: these move up to the next free index
    assert time_grid(schedule, 100, Spacing.quadratic)[-6:] == [0.005, 0.004, 0.003, 0.002, 0.001, 0.0]


# -- Gaussian data --


def test_the_exact_denoiser_has_the_exact_score() -> None:
    diffusion = build_diffusion("cosine")
    u = torch.linspace(-3, 3, 7, dtype=torch.float64).reshape(7, 1, 1, 1)
    a, v = diffusion.alpha(0.4).item(), diffusion.sigma(0.4).item() ** 2
    score = GaussianDenoiser(diffusion)(u, 0.4).score
    torch.testing.assert_close(score, -(u - a * MEAN) / (a**2 * VARIANCE + v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", ["ddpm_linear", "cosine"])
@pytest.mark.parametrize("spacing", list(Spacing))
def test_ddim_is_eulers_rule_in_the_noise_to_signal_ratio(schedule: str, spacing: Spacing) -> None:
    """With r = sigma/alpha and w = u/alpha the flow is dw = eps dr (Song et al. 2021, equation 14)."""
    diffusion = build_diffusion(schedule)
    a_1 = diffusion.alpha(1.0).item()
    gain, offset = 1.0 / a_1, -MEAN  # w - MEAN = gain u_1 + offset
    for abar_t, abar_s in levels(diffusion, 50, spacing):
        r_t, r_s = (math.sqrt((1 - abar) / abar) for abar in (abar_t, abar_s))
        factor = 1 + (r_s - r_t) * r_t / (VARIANCE + r_t**2)
        gain, offset = gain * factor, offset * factor
    mean, variance = affine("ddim", diffusion, steps=50, spacing=spacing.name)
    assert mean == pytest.approx(MEAN + offset, abs=1e-8)
    assert variance == pytest.approx(gain**2, rel=1e-7)


STOCHASTIC = ["fixedsmall", "fixedlarge"]
VARIANTS = [("ddim", {}), *(("ddpm", {"variance": variance}) for variance in STOCHASTIC)]


@pytest.mark.parametrize("schedule", ["ddpm_linear", "cosine"])
@pytest.mark.parametrize("spacing", list(Spacing))
@pytest.mark.parametrize("kind", STOCHASTIC)
def test_ddpm_obeys_its_linear_recursion(schedule: str, spacing: Spacing, kind: str) -> None:
    diffusion = build_diffusion(schedule)
    mean, variance = 0.0, 1.0
    for abar_t, abar_s in levels(diffusion, 50, spacing):
        beta = 1 - abar_t / abar_s
        c1 = math.sqrt(abar_s) * beta / (1 - abar_t)
        c2 = math.sqrt(1 - beta) * (1 - abar_s) / (1 - abar_t)
        slope = math.sqrt(abar_t) * VARIANCE / (abar_t * VARIANCE + 1 - abar_t)  # of E[x0 | u_t]
        gain = c1 * slope + c2
        added = beta if kind == "fixedlarge" else (1 - abar_s) / (1 - abar_t) * beta
        mean = gain * mean + c1 * MEAN * (1 - slope * math.sqrt(abar_t))
        variance = gain**2 * variance + (added if abar_s < 1 else 0.0)
    found = affine("ddpm", diffusion, steps=50, spacing=spacing.name, variance=kind)
    assert found == (pytest.approx(mean, rel=1e-10), pytest.approx(variance, rel=1e-10))


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_ddpm_noise_has_the_variance_of_the_papers_tables(kind: str) -> None:
    """Step by step over all 1000: "fixedlarge" is beta[1:], "fixedsmall" the posterior variance; none in the last."""
    diffusion = build_diffusion("ddpm_linear")
    betas = np.linspace(1e-4, 0.02, 1000)
    abar = np.cumprod(1 - betas)
    table = betas[1:] if kind == "fixedlarge" else betas[1:] * (1 - abar[:-1]) / (1 - abar[1:])
    states: dict[float, torch.Tensor] = {}

    def keep(i: int, t: float, u: torch.Tensor) -> torch.Tensor:
        states[round(1000 * t)] = u
        return torch.zeros_like(u)  # so that each step is seen alone

    u = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    unit = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    sampler("ddpm", variance=kind).sample(GaussianDenoiser(diffusion), u, lambda i: unit, keep)
    added = np.array([(states[i][1] - states[i][0]).item() for i in range(1000)])
    np.testing.assert_allclose(added[1:] ** 2, table, rtol=1e-10)
    assert added[0] == 0.0


@pytest.mark.parametrize(("name", "fields"), VARIANTS)
@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
def test_standard_deviation_converges_at_order_1(name: str, fields: dict[str, str], spacing: str) -> None:
    """On the cosine clock from 100 to 400 steps the error halves with the step (found: order 0.91 to 1.01)."""
    counts = [100, 200, 400]
    found = [math.sqrt(affine(name, build_diffusion("cosine"), steps=n, spacing=spacing, **fields)[1]) for n in counts]
    error = np.abs(np.array(found) - math.sqrt(VARIANCE))
    np.testing.assert_allclose(np.log2(error[:-1] / error[1:]), 1.0, atol=0.12)


@pytest.mark.parametrize(("name", "fields"), VARIANTS)
def test_recovers_mean_and_variance(name: str, fields: dict[str, str]) -> None:
    """At DDPM's 1000 steps within 2%; fixedsmall, right for data that are one point, is the furthest off (-1.6%)."""
    mean, variance = affine(name, build_diffusion("ddpm_linear"), steps=1000, **fields)
    assert mean == pytest.approx(MEAN, abs=2e-3)
    assert variance == pytest.approx(VARIANCE, rel=2e-2)


@pytest.mark.parametrize(("name", "fields"), [*VARIANTS, ("ddim", {"eta": 0.5})])
def test_monte_carlo(name: str, fields: dict) -> None:
    diffusion, n = build_diffusion("cosine"), 40_000
    mean, variance = affine(name, diffusion, steps=20, **fields)
    rng = np.random.default_rng(0)
    u = torch.from_numpy(rng.normal(size=(n, 1, 1, 1)))
    end = sampler(name, steps=20, **fields).sample(
        GaussianDenoiser(diffusion), u, lambda i: torch.from_numpy(rng.normal(size=(n, 1, 1, 1)))
    )
    assert end.u.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / n))
    assert end.u.var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / n))


# -- DDIM against DDPM --


@pytest.mark.parametrize("schedule", ["ddpm_linear", "cosine"])
@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim_with_eta_1_is_ddpm_fixedsmall(schedule: str, spacing: str, clip: bool) -> None:
    diffusion = build_diffusion(schedule)
    rng = np.random.default_rng(1)
    u, *noises = (torch.from_numpy(rng.normal(size=(64, 1, 1, 1))) for _ in range(31))
    ends = [
        sampler(name, steps=30, spacing=spacing, clip_x0=clip, **fields)
        .sample(GaussianDenoiser(diffusion), 3 * u, noises.__getitem__)
        .u
        for name, fields in [("ddim", {"eta": 1.0}), ("ddpm", {"variance": "fixedsmall"})]
    ]
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-10)


# -- the contract of samplers --


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
@pytest.mark.parametrize("steps", [1, 2, 50, 1000, 5000])
def test_nfe_is_the_number_of_calls(name: str, steps: int) -> None:
    model = GaussianDenoiser(build_diffusion("ddpm_linear", steps=100))
    u = torch.zeros(1, 1, 1, 1)
    end = sampler(name, steps=steps, spacing="quadratic").sample(model, u, lambda i: u)
    assert end.nfe == len(model.calls) == min(steps, 100)
    assert model.calls[0] == 1.0
    assert end.u.dtype == u.dtype


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_one_step_returns_x0(name: str) -> None:
    model = GaussianDenoiser(build_diffusion("cosine"))
    u = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64)
    end = sampler(name, steps=1).sample(model, u, no_noise)
    torch.testing.assert_close(end.u, model(u, 1.0).x0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_on_step_sees_every_state_and_may_replace_it(name: str) -> None:
    model = GaussianDenoiser(build_diffusion("cosine"))
    u = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    seen: list[tuple[int, float]] = []

    def replace(i: int, t: float, state: torch.Tensor) -> torch.Tensor:
        seen.append((i, t))
        assert i > 0 or torch.equal(state, 0.5 * u)  # the start, after temperature
        return torch.full_like(state, float(i))

    end = sampler(name, steps=4, temperature=0.5).sample(model, u, lambda i: u, replace)
    assert seen == [(0, 1.0), (1, 0.75), (2, 0.5), (3, 0.25), (4, 0.0)]
    assert end.u.item() == 4.0


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_temperature_scales_the_start_only(name: str) -> None:
    diffusion = build_diffusion("ddpm_linear")
    u, noise = torch.full((1, 1, 1, 1), 0.8, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    cool = sampler(name, steps=10, temperature=0.5).sample(GaussianDenoiser(diffusion), u, lambda i: noise)
    half = sampler(name, steps=10).sample(GaussianDenoiser(diffusion), 0.5 * u, lambda i: noise)
    assert torch.equal(cool.u, half.u)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
@pytest.mark.parametrize("clip", [False, True])
def test_clip_is_asked_of_the_model(name: str, clip: bool) -> None:
    model = GaussianDenoiser(build_diffusion("cosine"))
    u = torch.full((1, 1, 1, 1), 1e6, dtype=torch.float64)
    end = sampler(name, steps=2, spacing="quadratic", clip_x0=clip).sample(model, u, torch.zeros_like(u).mul).u.item()
    assert (end <= 1.0) == clip


class Momentum(Process):
    """A process with k = 2."""

    def __init__(self) -> None:
        self.D, self.Q, self.S_inf = np.eye(2), np.zeros((2, 2)), np.eye(2)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_supports_one_component_only(name: str) -> None:
    diffusion = build_diffusion("cosine")
    assert sampler(name).supports(diffusion)
    assert not sampler(name).supports(Diffusion(Momentum(), diffusion.schedule))


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("ddpm", {"steps": 0}, r"sampler\.steps=0"),
        ("ddim", {"steps": -3}, r"sampler\.steps=-3"),
        ("ddim", {"eta": 1.5}, r"sampler\.eta=1\.5"),
        ("ddim", {"spacing": "cubic"}, r"sampler\.spacing"),
        ("ddpm", {"variance": "learned"}, r"sampler\.variance"),
    ],
)
def test_refuses(name: str, fields: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        sampler(name, **fields)
