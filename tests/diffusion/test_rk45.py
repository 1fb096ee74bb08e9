"""The adaptive integrator: solutions known in closed form, and samples that do not feel their neighbors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from dvae.diffusion.rk45 import integrate
from dvae.errors import UserError


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def decay(y: torch.Tensor, t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return -y


class Rotation:
    """y'' = -w^2 y for a frequency w per sample, as a first-order system; counts what it evaluates."""

    def __init__(self, *frequencies: float) -> None:
        self.w = column(*frequencies)
        self.evaluated = torch.zeros(len(frequencies), dtype=torch.int64)

    def __call__(self, y: torch.Tensor, t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        self.evaluated[rows] += 1
        return self.w[rows] * torch.stack([y[:, 1], -y[:, 0]], 1)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
def test_decay_within_the_tolerance(tolerance: float) -> None:
    y = integrate(decay, column(1.0, 5.0), 0.0, 3.0, tolerance).y
    torch.testing.assert_close(y, column(1.0, 5.0) * math.exp(-3.0), rtol=0, atol=5 * tolerance)


@pytest.mark.parametrize(("start", "end"), [(0.0, 2.0), (2.0, 0.0), (-1.0, 0.5)])
def test_polynomials_of_degree_4_are_exact_in_either_direction(start: float, end: float) -> None:
    found = integrate(lambda y, t, rows: (5 * t**4 - 3 * t**2)[:, None], column(1.0), start, end, 1e-2).y.item()
    assert found == pytest.approx(1.0 + (end**5 - end**3) - (start**5 - start**3), abs=1e-13)


def test_forth_and_back_again() -> None:
    y = column(1.0, 0.3).T
    there = integrate(Rotation(2.0), y, 0.0, 7.0, 1e-10).y
    torch.testing.assert_close(integrate(Rotation(2.0), there, 7.0, 0.0, 1e-10).y, y, rtol=0, atol=1e-8)


def test_evaluations_grow_with_the_fifth_root_of_the_tolerance() -> None:
    """Order 5: 10^4 times the accuracy costs 10^(4/5) times the evaluations."""
    few, many = (integrate(Rotation(1.0), column(1.0, 0.0).T, 0.0, 20.0, t).evaluations.item() for t in (1e-5, 1e-9))
    assert many / few == pytest.approx(10.0**0.8, rel=0.1)


def test_costs_what_scipy_costs() -> None:
    tolerance = 1e-7
    ours = integrate(Rotation(3.0), column(1.0, 0.0).T, 0.0, 10.0, tolerance)
    theirs = solve_ivp(
        lambda t, y: 3.0 * np.array([y[1], -y[0]]), (0.0, 10.0), [1.0, 0.0], rtol=tolerance, atol=tolerance
    )
    assert ours.evaluations.item() == pytest.approx(theirs.nfev, rel=0.15)
    np.testing.assert_allclose(ours.y[0], theirs.y[:, -1], atol=100 * tolerance)


def test_each_sample_goes_its_own_way() -> None:
    """The slow one is done early and is evaluated no more; alone, each takes the same steps to the last bit."""
    frequencies = (0.1, 20.0, 3.0)
    y, field = torch.tensor([[1.0, 0.0]] * 3, dtype=torch.float64), Rotation(*frequencies)
    together = integrate(field, y, 0.0, 5.0, 1e-6)
    assert torch.equal(field.evaluated, together.evaluations)
    slow, fast, middle = together.evaluations.tolist()
    assert slow < middle / 3 < fast / 9
    for i, w in enumerate(frequencies):
        alone = integrate(Rotation(w), y[i : i + 1], 0.0, 5.0, 1e-6)
        assert torch.equal(alone.y[0], together.y[i])
        assert alone.evaluations[0] == together.evaluations[i]


def test_keeps_shape_and_dtype() -> None:
    y = torch.ones(2, 3, 4, 5)
    end = integrate(decay, y, 0.0, 1.0, 1e-5).y
    assert (end.shape, end.dtype) == (y.shape, torch.float32)
    torch.testing.assert_close(end, y / math.e, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fault", ["blows up", "nan"])
def test_ends_in_one_line_where_it_cannot_arrive(fault: str) -> None:
    calls = []

    def field(y: torch.Tensor, t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        calls.append(len(rows))
        return torch.where(y > 0.0, y**2 if fault == "blows up" else torch.full_like(y, math.nan), -y)

    with pytest.raises(UserError, match=r"tolerance=1e-05 cannot be met: sample 1 is stuck between 0 and 2") as error:
        integrate(field, column(-1.0, 1.0), 0.0, 2.0, 1e-5)  # y' = y^2 from 1 is infinite at t = 1
    assert "\n" not in str(error.value)
    assert len(calls) < 1500
