"""The contract of samplers, over all registered names; DDPM and DDIM against their papers' recursions."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from closed_forms import IO, Mixture, affine, diffusion, integrable, normal
from scipy.stats import norm

from dvae.diffusion.kernels import Diffusion, Prediction, Time
from dvae.diffusion.sampler_model import Threshold
from dvae.diffusion.time_grid import Spacing, time_grid
from dvae.errors import UserError
from dvae.models.components import build_sampler
from dvae.registry.samplers.base import SAMPLERS, Sampler
from dvae.registry.schedules.base import SCHEDULES

MEAN, VARIANCE = 0.3, 0.25
THREE = {"means": (-0.8, 0.1, 0.7), "variances": (0.02, 0.05, 0.03), "weights": (0.3, 0.5, 0.2)}

EVERY = integrable(("vp",), ("linear", "cosine", "flow")) + integrable(("cld", "psld"), ("constant",))
FEWER = [case for case in EVERY if case[1:] in (("vp", "linear"), ("vp", "flow"), ("psld", "constant"))]
STEPWISE = [case for case in FEWER if SAMPLERS.get(case[0]).lockstep]
"""Those whose samples stand at the same time after each step."""
EVERY_CLOCK = integrable(("vp",), tuple(SCHEDULES.names())) + integrable(("psld",), ("constant",))
recovers = pytest.mark.parametrize(("name", "process", "schedule"), EVERY)
every_sampler = pytest.mark.parametrize(("name", "process", "schedule"), FEWER)
every_stepwise = pytest.mark.parametrize(("name", "process", "schedule"), STEPWISE)
QUICK = {"ode": {"tolerance": 1e-3}}


def sampler(name: str, k: int = 1, **fields) -> Sampler:
    return SAMPLERS.build({"name": name, "threshold": "none", **QUICK.get(name, {}), **fields}, replace(IO, k=k))


def start(made: Diffusion, n: int, seed: int = 0) -> torch.Tensor:
    return made.sample_prior(normal(seed, n, made.k, 1, 1))


def noises(made: Diffusion, n: int):
    """Keyed noise: number i is the same whenever asked for."""
    return lambda i: normal(1000 + i, n, made.k, 1, 1)


# -- the contract --


@recovers
def test_recovers_gaussian_data(name: str, process: str, schedule: str) -> None:
    """At 100 steps of the default spacing: mean within 0.01, variance within 8% (em and ddpm are the furthest off)."""
    made = diffusion(process, schedule)
    mean, variance = affine(sampler(name, made.k, steps=100), Mixture(made), noises=200)
    assert mean == pytest.approx(MEAN, abs=0.01)
    assert variance == pytest.approx(VARIANCE, rel=0.08)


@recovers
def test_recovers_a_mixture(name: str, process: str, schedule: str) -> None:
    """At 100 steps of the default spacing: mean within 0.01, variance within 8%, distribution function within 0.02,
    each plus what chance does to n samples in 1 of 10,000 cases."""
    made = diffusion(process, schedule)
    n = 1000 if SAMPLERS.get(name).lockstep else 200
    model = Mixture(made, **THREE)
    x = sampler(name, made.k, steps=100).sample(model, start(made, n), noises(made, n)).u[:, 0].flatten().numpy()
    assert x.mean() == pytest.approx(model.mean, abs=0.01 + 4 * math.sqrt(model.variance / n))
    assert x.var() == pytest.approx(model.variance, rel=0.08 + 4 * math.sqrt(2 / n))
    x.sort()
    parts = zip(model.weights, model.means, model.variances, strict=True)
    wanted = sum(w * norm.cdf(x, m, math.sqrt(v)) for w, m, v in parts)
    assert np.abs(wanted - (np.arange(n) + 0.5) / n).max() < 0.02 + 2.2 / math.sqrt(n)


@pytest.mark.parametrize(("name", "process", "schedule"), EVERY_CLOCK)
def test_float32_stays_finite_and_float32(name: str, process: str, schedule: str) -> None:
    """From t = 1 on every clock, with a start far out."""
    made = diffusion(process, schedule)
    u = (3.0 * start(made, 4)).float()
    end = sampler(name, made.k, steps=7).sample(Mixture(made, **THREE), u, lambda i: u)
    assert end.u.dtype == torch.float32
    assert end.u.isfinite().all()
    assert end.nfe.dtype == torch.int64


@every_stepwise
def test_a_sample_depends_on_its_noise_alone(name: str, process: str, schedule: str) -> None:
    """Not on the batch that it sits in, nor on what was sampled before (ode: test_samplers_any.py)."""
    made = diffusion(process, schedule)
    model, made_sampler, n = Mixture(made, **THREE), sampler(name, made.k, steps=9), 3
    u, noise = start(made, n), noises(made, n)
    together = made_sampler.sample(model, u, noise)
    again = made_sampler.sample(model, u, noise)
    assert torch.equal(together.u, again.u)
    for j in range(n):
        alone = made_sampler.sample(model, u[j : j + 1], lambda i, j=j: noise(i)[j : j + 1])
        torch.testing.assert_close(alone.u[0], together.u[j], rtol=1e-11, atol=1e-11)
        assert alone.nfe.item() == together.nfe[j].item()


@every_stepwise
def test_nfe_is_calls_times_passes(name: str, process: str, schedule: str) -> None:
    made = diffusion(process, schedule)
    model = Mixture(made, nfe_per_call=2)
    u = start(made, 3)
    end = sampler(name, made.k, steps=6).sample(model, u, torch.zeros_like(u).mul)
    assert end.nfe.tolist() == [2 * len(model.calls)] * 3
    assert model.calls[0] == 1.0
    assert all(a >= b for a, b in pairwise(model.calls))


@pytest.mark.parametrize(("name", "per_step"), [("ddpm", 1), ("ddim", 1), ("dpmpp_2m", 1), ("unipc", 1), ("heun", 2)])
@pytest.mark.parametrize("steps", [1, 2, 50, 1000])
def test_nfe(name: str, per_step: int, steps: int) -> None:
    """The last step takes one evaluation; a table of 100 times has no more than 100 steps."""
    u = torch.zeros(1, 1, 1, 1)
    made = diffusion("vp", "ddpm_linear", fields={"steps": 100})
    end = sampler(name, steps=steps, spacing="quadratic").sample(Mixture(made), u, lambda i: u)
    assert end.nfe.item() == per_step * (min(steps, 100) - 1) + 1


@every_stepwise
def test_one_step_returns_x0(name: str, process: str, schedule: str) -> None:
    made = diffusion(process, schedule)
    model, u = Mixture(made, **THREE), start(made, 4)
    end = sampler(name, made.k, steps=1).sample(model, u, lambda i: pytest.fail("the last step adds no noise"))
    assert torch.equal(end.u, made.initial_state(model(u, 1.0).x0))


@every_stepwise
def test_on_step_sees_every_state_and_may_replace_it(name: str, process: str, schedule: str) -> None:
    made = diffusion(process, schedule)
    u, seen = start(made, 2), []

    def replaced(i: int, t: float, state: torch.Tensor) -> torch.Tensor:
        seen.append((i, t))
        assert i > 0 or torch.equal(state, 0.5 * u)  # the start, after temperature
        return torch.full_like(state, 0.1 * i)

    made_sampler = sampler(name, made.k, steps=4, temperature=0.5, spacing="uniform")
    end = made_sampler.sample(Mixture(made), u, lambda i: u, replaced)
    assert seen == [(0, 1.0), (1, 0.75), (2, 0.5), (3, 0.25), (4, 0.0)]
    assert torch.equal(end.u, torch.full_like(u, 0.4))


@every_sampler
def test_temperature_scales_the_start_only(name: str, process: str, schedule: str) -> None:
    made = diffusion(process, schedule)
    u, noise = start(made, 3), noises(made, 3)
    cool = sampler(name, made.k, steps=6, temperature=0.5).sample(Mixture(made), u, noise)
    half = sampler(name, made.k, steps=6).sample(Mixture(made), 0.5 * u, noise)
    assert torch.equal(cool.u, half.u)


class RecordingDenoiser(Mixture):
    """Keeps the thresholds that it was asked for."""

    def __call__(self, u: torch.Tensor, t: Time, *, threshold: Threshold = Threshold.none) -> Prediction:
        self.asked = {*getattr(self, "asked", set()), threshold}
        return super().__call__(u, t, threshold=threshold)


@every_sampler
@pytest.mark.parametrize("threshold", [Threshold.none, Threshold.clamp])
def test_threshold_is_asked_of_every_call(name: str, process: str, schedule: str, threshold: Threshold) -> None:
    made = diffusion(process, schedule)
    model, u = RecordingDenoiser(made), 4.0 * start(made, 8)
    fields = {"steps": 3, "threshold": threshold.name}
    end = sampler(name, made.k, **fields).sample(model, u, torch.zeros_like(u).mul).u
    assert model.asked == {threshold}
    assert threshold is Threshold.none or end[:, 0].abs().max() <= 1.0


# -- what is refused --


def test_a_sampler_that_cannot_integrate_the_process_names_those_that_can() -> None:
    shapes = replace(IO, k=2)
    for name in ("ddpm", "ddim", "heun", "dpmpp_2m", "unipc"):
        with pytest.raises(UserError, match=f"^sampler={name} does not integrate process=psld .*: use one of .*deis"):
            build_sampler({"name": name}, diffusion("psld", "constant"), shapes)


@pytest.mark.parametrize("spacing", ["log_snr", "karras"])
def test_spacing_by_noise_level_needs_one_component(spacing: str) -> None:
    build_sampler({"name": "em", "spacing": spacing}, diffusion("vp", "constant"), IO)
    with pytest.raises(UserError, match=rf"sampler\.spacing={spacing} .*use uniform or quadratic"):
        build_sampler({"name": "em", "spacing": spacing}, diffusion("cld", "constant"), replace(IO, k=2))


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("ddpm", {"steps": 0}, r"sampler\.steps=0"),
        ("ddim", {"steps": -3}, r"sampler\.steps=-3"),
        ("ddim", {"eta": 1.5}, r"sampler\.eta=1\.5"),
        ("ddim", {"spacing": "cubic"}, r"sampler\.spacing"),
        ("ddpm", {"variance": "learned"}, r"sampler\.variance"),
        ("ddpm", {"sigma_scale": -0.1}, r"sampler\.sigma_scale=-0\.1"),
        ("dpmpp_2m", {"eta": -0.5}, r"sampler\.eta=-0\.5"),
        ("unipc", {"order": 4}, r"sampler\.order=4"),
    ],
)
def test_refuses(name: str, fields: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        sampler(name, **fields)


# -- DDPM and DDIM on Gaussian data --


def levels(made: Diffusion, steps: int, spacing: Spacing) -> list[tuple[float, float]]:
    """(abar_t, abar_s) of every step, from the clock alone."""
    times = torch.tensor(time_grid(made.schedule, steps, spacing), dtype=torch.float64)
    return list(pairwise(torch.exp(-made.schedule.integral(times)).tolist()))


def test_the_exact_denoiser_has_the_exact_score() -> None:
    model = Mixture(diffusion("vp", "cosine"))
    u = torch.linspace(-3, 3, 7, dtype=torch.float64).reshape(7, 1, 1, 1)
    a, v = model.diffusion.alpha(0.4).item(), model.diffusion.sigma(0.4).item() ** 2
    found, mean = model(u, 0.4), MEAN + a * VARIANCE / (a**2 * VARIANCE + v) * (u - a * MEAN)
    torch.testing.assert_close(found.score, -(u - a * MEAN) / (a**2 * VARIANCE + v), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.x0, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a * found.x0 + math.sqrt(v) * found.eps, u, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", ["ddpm_linear", "cosine"])
@pytest.mark.parametrize("spacing", list(Spacing))
def test_ddim_is_eulers_rule_in_the_noise_to_signal_ratio(schedule: str, spacing: Spacing) -> None:
    """With r = sigma/alpha and w = u/alpha the flow is dw = eps dr (Song et al. 2021, equation 14)."""
    made = diffusion("vp", schedule)
    gain, offset = 1.0 / made.alpha(1.0).item(), -MEAN  # w - MEAN = gain u_1 + offset
    for abar_t, abar_s in levels(made, 50, spacing):
        r_t, r_s = (math.sqrt((1 - abar) / abar) for abar in (abar_t, abar_s))
        factor = 1 + (r_s - r_t) * r_t / (VARIANCE + r_t**2)
        gain, offset = gain * factor, offset * factor
    mean, variance = affine(sampler("ddim", steps=50, spacing=spacing.name), Mixture(made), noises=0)
    assert mean == pytest.approx(MEAN + offset, abs=1e-8)
    assert variance == pytest.approx(gain**2, rel=1e-7)


STOCHASTIC = ["fixedsmall", "fixedlarge"]
VARIANTS = [("ddim", {}), *(("ddpm", {"variance": variance}) for variance in STOCHASTIC)]


@pytest.mark.parametrize("schedule", ["ddpm_linear", "cosine"])
@pytest.mark.parametrize("spacing", list(Spacing))
@pytest.mark.parametrize("kind", STOCHASTIC)
def test_ddpm_obeys_its_linear_recursion(schedule: str, spacing: Spacing, kind: str) -> None:
    made = diffusion("vp", schedule)
    mean, variance = 0.0, 1.0
    for abar_t, abar_s in levels(made, 50, spacing):
        beta = 1 - abar_t / abar_s
        c1 = math.sqrt(abar_s) * beta / (1 - abar_t)
        c2 = math.sqrt(1 - beta) * (1 - abar_s) / (1 - abar_t)
        slope = math.sqrt(abar_t) * VARIANCE / (abar_t * VARIANCE + 1 - abar_t)  # of E[x0 | u_t]
        gain = c1 * slope + c2
        added = beta if kind == "fixedlarge" else (1 - abar_s) / (1 - abar_t) * beta
        mean = gain * mean + c1 * MEAN * (1 - slope * math.sqrt(abar_t))
        variance = gain**2 * variance + (added if abar_s < 1 else 0.0)
    found = affine(sampler("ddpm", steps=50, spacing=spacing.name, variance=kind), Mixture(made), noises=50)
    assert found == (pytest.approx(mean, rel=1e-8), pytest.approx(variance, rel=1e-8))


@pytest.mark.parametrize(("kind", "scale"), [("fixedsmall", 1.0), ("fixedlarge", 0.95)])
def test_ddpm_noise_has_the_variance_of_the_papers_tables(kind: str, scale: float) -> None:
    """Step by step over all 1000: "fixedlarge" is beta[1:], "fixedsmall" the posterior variance; none in the last."""
    betas = np.linspace(1e-4, 0.02, 1000)
    abar = np.cumprod(1 - betas)
    table = betas[1:] if kind == "fixedlarge" else betas[1:] * (1 - abar[:-1]) / (1 - abar[1:])
    states: dict[int, torch.Tensor] = {}

    def keep(i: int, t: float, u: torch.Tensor) -> torch.Tensor:
        states[round(1000 * t)] = u
        return torch.zeros_like(u)  # so that each step is seen alone

    u = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    unit = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    model = Mixture(diffusion("vp", "ddpm_linear"))
    sampler("ddpm", variance=kind, sigma_scale=scale).sample(model, u, lambda i: unit, keep)
    added = np.array([(states[i][1] - states[i][0]).item() for i in range(1000)])
    np.testing.assert_allclose(added[1:] ** 2, scale**2 * table, rtol=1e-10)
    assert added[0] == 0.0


@pytest.mark.parametrize(("name", "fields"), VARIANTS)
@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
def test_standard_deviation_converges_at_order_1(name: str, fields: dict[str, str], spacing: str) -> None:
    """On the cosine clock from 100 to 200 steps the error halves with the step (found: order 0.91 to 1.00)."""
    model = Mixture(diffusion("vp", "cosine"))
    found = [affine(sampler(name, steps=n, spacing=spacing, **fields), model, noises=n)[1] for n in (100, 200)]
    error = np.abs(np.sqrt(found) - math.sqrt(VARIANCE))
    assert math.log2(error[0] / error[1]) == pytest.approx(1.0, abs=0.12)


@pytest.mark.parametrize(
    ("name", "fields", "wanted"),
    [
        ("ddim", {}, 0.2485),
        ("ddpm", {"variance": "fixedsmall"}, 0.2461),
        ("ddpm", {"variance": "fixedlarge"}, 0.2508),
    ],
)
def test_recovers_mean_and_variance_at_ddpms_1000_steps(name: str, fields: dict[str, str], wanted: float) -> None:
    """Within 2%; fixedsmall, right for data that are one point, is the furthest off (-1.6%)."""
    model = Mixture(diffusion("vp", "ddpm_linear"))
    mean, variance = affine(sampler(name, steps=1000, **fields), model, noises=1000 if name == "ddpm" else 0)
    assert mean == pytest.approx(MEAN, abs=2e-3)
    assert variance == pytest.approx(wanted, abs=5e-5)


@pytest.mark.parametrize(("name", "fields"), [*VARIANTS, ("ddim", {"eta": 0.5}), ("dpmpp_2m", {"eta": 1.0})])
def test_monte_carlo(name: str, fields: dict) -> None:
    """The affine response, from which all else follows, is what drawn noise gives."""
    made, n = diffusion("vp", "cosine"), 40_000
    mean, variance = affine(sampler(name, steps=20, **fields), Mixture(made), noises=20)
    end = sampler(name, steps=20, **fields).sample(Mixture(made), start(made, n), noises(made, n)).u
    assert end.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / n))
    assert end.var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / n))


@pytest.mark.parametrize("schedule", ["ddpm_linear", "cosine"])
@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
@pytest.mark.parametrize("threshold", ["none", "clamp"])
def test_ddim_with_eta_1_is_ddpm_fixedsmall(schedule: str, spacing: str, threshold: str) -> None:
    made = diffusion("vp", schedule)
    ends = [
        sampler(name, steps=30, spacing=spacing, threshold=threshold, **fields)
        .sample(Mixture(made), 3 * start(made, 64), noises(made, 64))
        .u
        for name, fields in [("ddim", {"eta": 1.0}), ("ddpm", {"variance": "fixedsmall"})]
    ]
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-10)
