"""The clocks: DDPM's table and the cosine against closed forms, and the contract of every schedule."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from dvae.errors import UserError
from dvae.registry import SCHEDULES, Shapes

IO = Shapes(image_size=8)
INDICES = [0, 1, 500, 999]


def build(name: str, **fields: float):
    return SCHEDULES.build({"name": name, **fields}, IO)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(params=SCHEDULES.names())
def schedule(request):
    return build(request.param)


# -- the contract of every schedule --


def test_b_starts_at_zero_increases_and_stays_finite(schedule) -> None:
    B = schedule.integral(torch.linspace(0, 1, 20_001, dtype=torch.float64))
    assert B[0] == 0.0
    assert torch.isfinite(B).all()
    assert (B.diff() > 0).all()


def test_inverse(schedule) -> None:
    t = torch.cat([tensor(0.0, 1e-9, 1e-6, 1e-4), torch.linspace(0, 1, 20_001, dtype=torch.float64)])
    torch.testing.assert_close(schedule.inverse(schedule.integral(t)), t, rtol=0, atol=1e-9)


def test_rate_is_the_derivative_of_b(schedule) -> None:
    t = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000  # away from the kinks of a table
    h = 1e-6
    slope = (schedule.integral(t + h) - schedule.integral(t - h)) / (2 * h)
    torch.testing.assert_close(schedule.rate(t), slope, rtol=2e-6, atol=1e-7)


def test_any_shape_and_float64(schedule) -> None:
    t = torch.rand(2, 3, dtype=torch.float64)
    for function in (schedule.integral, schedule.rate, schedule.inverse, schedule.feature):
        out = function(t)
        assert out.shape == t.shape
        assert out.dtype == torch.float64


def test_feature_is_increasing_and_within_0_and_1000(schedule) -> None:
    feature = schedule.feature(torch.linspace(1e-3, 1, 1000, dtype=torch.float64))
    assert feature.min() >= 0
    assert feature.max() <= 1000
    assert (feature.diff() > 0).all()


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_built_on_the_meta_device_it_still_has_its_values(name: str) -> None:
    t = tensor(0.0, 0.4, 1.0)
    with torch.device("meta"):
        schedule = build(name)
    assert torch.equal(schedule.integral(t), build(name).integral(t))


# -- DDPM's table --


def test_ddpm_table_against_exact_arithmetic() -> None:
    schedule = build("ddpm_linear")
    with mpmath.workdps(40):
        start, end = mpmath.mpf("0.0001"), mpmath.mpf("0.02")
        betas = [start + (end - start) * i / 999 for i in range(1000)]
        abar, product = [], mpmath.mpf(1)
        for beta in betas:
            product *= 1 - beta
            abar.append(product)
        for i in INDICES:
            assert schedule.betas[i].item() == pytest.approx(float(betas[i]), rel=1e-12, abs=0)
            assert schedule.abar[i].item() == pytest.approx(float(abar[i]), rel=1e-12, abs=0)
            B = schedule.integral(tensor((i + 1) / 1000)).item()
            expected = -float(mpmath.log(abar[i]))
            assert pytest.approx(expected, rel=1e-12, abs=0) == B
    assert len(schedule.betas) == len(schedule.abar) == schedule.steps == 1000


def test_ddpm_feature_is_the_index_of_the_table() -> None:
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(
        build("ddpm_linear").feature(t), torch.arange(1000, dtype=torch.float64), rtol=0, atol=1e-9
    )
    assert build("ddpm_linear", steps=100).feature(tensor(0.01, 1.0)).tolist() == pytest.approx([0.0, 990.0])


def test_ddpm_rate_at_a_table_time_is_that_of_the_step_ending_there() -> None:
    schedule = build("ddpm_linear", steps=4, beta_start=0.1, beta_end=0.4)
    assert schedule.rate(tensor(0.0, 0.25, 0.26, 1.0)).tolist() == pytest.approx(
        [-4 * math.log(1 - beta) for beta in (0.1, 0.1, 0.2, 0.4)]
    )


@pytest.mark.parametrize("fields", [{"steps": 0}, {"beta_start": 0.0}, {"beta_end": 1.0}, {"beta_start": 0.5}])
def test_ddpm_refuses(fields: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"schedule\.\w+="):
        build("ddpm_linear", **fields)


# -- cosine --


def cosine_table(offset: str) -> list[mpmath.mpf]:
    """B at i/1000, i = 0..1000, of the paper's table with beta capped at 0.999, to 40 digits."""
    with mpmath.workdps(40):
        s = mpmath.mpf(offset)

        def f(i: int) -> mpmath.mpf:
            return mpmath.cos((mpmath.mpf(i) / 1000 + s) / (1 + s) * mpmath.pi / 2) ** 2

        B = [mpmath.mpf(0)]
        for i in range(1, 1001):
            beta = min(1 - f(i) / f(i - 1), mpmath.mpf("0.999"))
            B.append(B[-1] - mpmath.log(1 - beta))
        return B


@pytest.mark.parametrize("offset", ["0.008", "0.0001", "0.5"])
def test_cosine_agrees_with_the_papers_capped_table(offset: str) -> None:
    B = build("cosine", offset=float(offset)).integral(torch.arange(1001, dtype=torch.float64) / 1000)
    expected = torch.tensor([float(value) for value in cosine_table(offset)], dtype=torch.float64)
    torch.testing.assert_close(B, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("t", ["1e-9", "1e-5", "0.001", "0.3"])
def test_cosine_keeps_its_digits_at_small_t(t: str) -> None:
    with mpmath.workdps(40):
        s = mpmath.mpf("0.008")
        angle = mpmath.pi / 2 / (1 + s)
        exact = -2 * mpmath.log(mpmath.cos((mpmath.mpf(t) + s) * angle) / mpmath.cos(s * angle))
    assert build("cosine").integral(tensor(float(t))).item() == pytest.approx(float(exact), rel=1e-12, abs=0)


def test_cosine_is_continuous_in_time_and_ends_in_noise() -> None:
    schedule = build("cosine")
    assert schedule.steps is None
    assert math.exp(-schedule.integral(tensor(1.0)).item()) == pytest.approx(2.4e-9, rel=0.02)


@pytest.mark.parametrize("offset", [0.0, -1.0, float("nan")])
def test_cosine_refuses(offset: float) -> None:
    with pytest.raises(UserError, match=r"schedule\.offset="):
        build("cosine", offset=offset)
