"""The grid of times: Karras' and Lu's published steps, rounding to a table, and what holds on every schedule."""

from __future__ import annotations

from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvae.diffusion.time_grid import NOISE_LEVEL, Spacing, time_grid
from dvae.errors import UserError
from dvae.registry.core import Shapes
from dvae.registry.schedules.base import SCHEDULES, Schedule

IO = Shapes(image_size=1, channels=1)


def build(name: str, **fields: float) -> Schedule:
    return SCHEDULES.build({"name": name, **fields}, IO)


SCHEDULES_BUILT = {
    **{name: build(name) for name in SCHEDULES.names()},
    **{f"{name} zero": build(name, zero_terminal_snr=True) for name in ("ddpm_linear", "linear", "cosine", "sigmoid")},
    **{f"table of {n}": build("ddpm_linear", steps=n, beta_start=0.3 / n, beta_end=0.5) for n in (1, 2, 7, 100)},
    "short zero": build("ddpm_linear", steps=3, beta_start=0.5, beta_end=0.9, zero_terminal_snr=True),
}
CONTINUOUS = sorted(name for name, schedule in SCHEDULES_BUILT.items() if schedule.steps is None)
LEVELS = [Spacing.log_snr, Spacing.karras]


def ratios(schedule: Schedule, times: list[float]) -> np.ndarray:
    """sigma/alpha at each time."""
    return schedule.integral(torch.tensor(times, dtype=torch.float64)).expm1().sqrt().numpy()


def even(spacing: Spacing, r: np.ndarray | float) -> np.ndarray:
    """The function of sigma/alpha in which the spacing is even."""
    return np.log(r) if spacing is Spacing.log_snr else np.power(r, 1 / 7)


# -- what holds everywhere --


@settings(deadline=None)
@given(
    st.sampled_from(sorted(SCHEDULES_BUILT)),
    st.sampled_from(list(Spacing)),
    st.integers(1, 1200),
    st.sampled_from([0.0, 1e-5, 0.01, 0.5, 0.999]),
    st.sampled_from([1e-6, 0.002, 0.4]),
)
def test_falls_from_1_to_0_in_distinct_times(
    name: str, spacing: Spacing, steps: int, t_min: float, sigma_min: float
) -> None:
    schedule = SCHEDULES_BUILT[name]
    grid = time_grid(schedule, steps, spacing, t_min, sigma_min)
    assert (grid[0], grid[-1]) == (1.0, 0.0)
    assert all(t > s for t, s in pairwise(grid))
    assert len(grid) == min(steps, schedule.steps or steps) + 1
    if schedule.steps is not None:
        assert set(grid) <= {i / schedule.steps for i in range(schedule.steps + 1)}


@settings(deadline=None)
@given(
    st.sampled_from([Spacing.uniform, Spacing.quadratic]), st.integers(2, 1200), st.sampled_from([0.0, 1e-5, 0.01, 0.5])
)
def test_uniform_and_quadratic_are_even_in_t_and_its_root(spacing: Spacing, steps: int, t_min: float) -> None:
    grid = time_grid(SCHEDULES_BUILT["cosine"], steps, spacing, t_min)
    root = 1.0 / spacing.value
    if t_min == 0.0:
        np.testing.assert_allclose(np.power(grid, root), np.linspace(1, 0, steps + 1), atol=1e-12)
    else:
        np.testing.assert_allclose(np.power(grid[:-1], root), np.linspace(1, t_min**root, steps), atol=1e-12)
        assert grid[-2] == pytest.approx(t_min, rel=1e-12)


@settings(deadline=None)
@given(st.sampled_from(CONTINUOUS), st.sampled_from(LEVELS), st.integers(2, 1200), st.sampled_from([1e-4, 0.002, 0.4]))
def test_log_snr_and_karras_are_even_in_their_function_of_the_noise(
    name: str, spacing: Spacing, steps: int, sigma_min: float
) -> None:
    schedule = SCHEDULES_BUILT[name]
    grid = time_grid(schedule, steps, spacing, sigma_min=sigma_min)
    top = min(NOISE_LEVEL, ratios(schedule, [1.0])[0])
    expected = np.linspace(even(spacing, top), even(spacing, sigma_min), steps)
    np.testing.assert_allclose(even(spacing, ratios(schedule, grid[1:-1])), expected[1:], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("spacing", list(Spacing))
@pytest.mark.parametrize("name", ["cosine", "flow", "ddpm_linear", "table of 1"])
def test_one_step_goes_all_the_way(name: str, spacing: Spacing) -> None:
    assert time_grid(SCHEDULES_BUILT[name], 1, spacing, t_min=0.01, sigma_min=0.01) == [1.0, 0.0]


# -- published steps --


@pytest.mark.parametrize(("steps", "sigma_min", "rho"), [(18, 0.002, 7.0), (40, 0.002, 7.0), (10, 0.03, 3.0)])
def test_karras_steps_on_edm(steps: int, sigma_min: float, rho: float) -> None:
    """Equation 5 of Karras et al. 2022, sigma_max = 80, at 40 digits."""
    schedule = build("edm")
    with mpmath.workdps(40):
        root = 1 / mpmath.mpf(rho)
        high, low = mpmath.mpf(80) ** root, mpmath.mpf(sigma_min) ** root
        sigmas = [float((high + mpmath.mpf(i) / (steps - 1) * (low - high)) ** rho) for i in range(steps)]
    grid = time_grid(schedule, steps, Spacing.karras, sigma_min=sigma_min, rho=rho)
    np.testing.assert_allclose(ratios(schedule, grid), [*sigmas, 0.0], rtol=1e-13)


def test_even_steps_on_edm_are_karras_with_sigma_min_0() -> None:
    schedule = build("edm")
    limit = time_grid(schedule, 19, Spacing.karras, sigma_min=1e-100)
    uniform = time_grid(schedule, 18, Spacing.uniform)
    np.testing.assert_allclose(limit[:-1], uniform, atol=1e-13)
    np.testing.assert_allclose(ratios(schedule, uniform), [80 * (j / 18) ** 7 for j in range(18, -1, -1)], rtol=1e-12)


def test_endless_schedules_begin_at_1_where_160_would_be() -> None:
    grid = time_grid(build("flow"), 5, Spacing.log_snr, sigma_min=0.016)
    r = [16.0, 1.6, 0.16, 0.016]  # 160 in four steps of a factor 10
    assert grid == pytest.approx([1.0, *(x / (1 + x) for x in r), 0.0], rel=1e-12)


# -- on a table --


def test_grids_by_hand() -> None:
    schedule = build("ddpm_linear")
    assert time_grid(schedule, 4, Spacing.uniform) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert time_grid(schedule, 4, Spacing.quadratic) == [1.0, 0.562, 0.25, 0.062, 0.0]
    # rounding (j/100)^2 1000 alone would give 0, 0, 1, 2, 2, 4, ...: these move up to the next free index
    assert time_grid(schedule, 100, Spacing.quadratic)[-6:] == [0.005, 0.004, 0.003, 0.002, 0.001, 0.0]
    assert time_grid(schedule, 3, Spacing.uniform, t_min=0.1) == [1.0, 0.55, 0.1, 0.0]
    # a t_min that leaves no room for ten distinct times above it gives way
    assert time_grid(build("ddpm_linear", steps=10), 10, Spacing.uniform, t_min=0.7)[-3:] == [0.2, 0.1, 0.0]


@pytest.mark.parametrize("spacing", LEVELS)
def test_a_few_levels_on_ddpms_table_take_the_nearest_times(spacing: Spacing) -> None:
    """From sigma/alpha = 157 down to the first of the table, 0.01, which is above sigma_min."""
    B = -np.cumsum(np.log1p(-np.linspace(1e-4, 0.02, 1000)))
    r = np.sqrt(np.expm1(B))
    targets = np.linspace(even(spacing, r[-1]), even(spacing, r[0]), 10)
    nearest = np.round(np.interp(targets[::-1], even(spacing, r), np.arange(1, 1001)))[::-1]
    grid = time_grid(build("ddpm_linear"), 10, spacing)
    np.testing.assert_array_equal(np.round(1000 * np.array(grid)), [*nearest, 0])


@pytest.mark.parametrize("spacing", list(Spacing))
@pytest.mark.parametrize("steps", [100, 5000])
def test_as_many_steps_as_the_table_are_the_table(spacing: Spacing, steps: int) -> None:
    assert time_grid(SCHEDULES_BUILT["table of 100"], steps, spacing) == [i / 100 for i in range(100, -1, -1)]


# -- refusals --


@pytest.mark.parametrize("t_min", [-0.1, 1.0, float("nan")])
@pytest.mark.parametrize("name", ["cosine", "ddpm_linear"])
def test_refuses_t_min(name: str, t_min: float) -> None:
    with pytest.raises(UserError, match=r"^sampler\.t_min=.*: must be in \[0, 1\)$"):
        time_grid(SCHEDULES_BUILT[name], 10, Spacing.uniform, t_min)


@pytest.mark.parametrize("sigma_min", [0.0, -1.0, 160.0, float("nan")])
@pytest.mark.parametrize(("name", "top"), [("edm", "80"), ("ddpm_linear", r"157\.4\d*"), ("flow", "160")])
def test_refuses_sigma_min(name: str, top: str, sigma_min: float) -> None:
    with pytest.raises(UserError, match=rf"^sampler\.sigma_min=.*: must be above 0 and below {top}, .*$"):
        time_grid(SCHEDULES_BUILT[name], 10, Spacing.karras, sigma_min=sigma_min)


def test_refuses_rho_and_more_steps_than_float64_tells_apart() -> None:
    with pytest.raises(UserError, match=r"^sampler\.rho=0\.0"):
        time_grid(SCHEDULES_BUILT["edm"], 10, Spacing.karras, rho=0.0)
    for fields in ({"sigma_min": 1e-200}, {"sigma_min": 80.0 * (1 - 1e-15)}):
        with pytest.raises(UserError, match=r"^sampler\.steps=1000: .*use fewer steps or another minimum$"):
            time_grid(SCHEDULES_BUILT["edm"], 1000, Spacing.log_snr, **fields)
