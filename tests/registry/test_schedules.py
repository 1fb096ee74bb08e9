"""The clocks: each against its published formula at 40 digits, and the contract of every schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch

from dvae.config import compose
from dvae.errors import UserError
from dvae.registry.core import Shapes
from dvae.registry.schedules.base import SCHEDULES

IO = Shapes(image_size=8)
INDICES = [0, 1, 500, 999]
ZERO_SNR = ["ddpm_linear", "linear", "cosine", "sigmoid"]
CASES: list[tuple[str, dict]] = [
    *((name, {}) for name in SCHEDULES.names()),
    *((name, {"zero_terminal_snr": True}) for name in ZERO_SNR),
    ("ddpm_linear", {"steps": 10, "beta_start": 0.01, "beta_end": 0.9, "zero_terminal_snr": True}),
    ("linear", {"beta_max": 200.0, "zero_terminal_snr": True}),
    ("linear", {"beta_min": 5.0, "beta_max": 5.0}),
    ("sigmoid", {"tau": 0.1}),
    ("sigmoid", {"tau": 0.1, "zero_terminal_snr": True}),
    ("sigmoid", {"start": 0.0, "tau": 0.3}),
    ("edm", {"sigma_max": 500.0, "rho": 1.0}),
    ("flow", {"shift": 3.0}),
]


def build(name: str, **fields: float):
    return SCHEDULES.build({"name": name, **fields}, IO)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def label(case: tuple[str, dict]) -> str:
    return "-".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])


@pytest.fixture(params=CASES, ids=label)
def schedule(request):
    name, fields = request.param
    return build(name, **fields)


# -- the contract of every schedule --


def test_b_starts_at_zero_increases_and_is_infinite_only_at_a_declared_end(schedule) -> None:
    B = schedule.integral(torch.linspace(0, 1, 20_001, dtype=torch.float64))
    assert B[0] == 0.0
    assert torch.isfinite(B[:-1]).all()
    assert B[-1].isinf() == schedule.rate(tensor(1.0)).isinf() == schedule.zero_terminal_snr
    assert (B.diff() > 0).all()


def test_inverse(schedule) -> None:
    """To nine digits of t itself, however small t is."""
    t = torch.cat([tensor(1e-9, 1e-6, 1e-4), torch.linspace(0, 1, 20_001, dtype=torch.float64)])
    torch.testing.assert_close(schedule.inverse(schedule.integral(t)), t, rtol=1e-9, atol=0)


def test_rate_is_the_derivative_of_b(schedule) -> None:
    t = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000  # away from the kinks of a table
    h = 1e-6
    slope = (schedule.integral(t + h) - schedule.integral(t - h)) / (2 * h)
    torch.testing.assert_close(schedule.rate(t), slope, rtol=2e-6, atol=1e-7)


def test_any_shape_and_float64(schedule) -> None:
    t = torch.rand(2, 3, dtype=torch.float64)
    for function in (schedule.integral, schedule.rate, schedule.inverse, schedule.time_feature):
        out = function(t)
        assert out.shape == t.shape
        assert out.dtype == torch.float64


def test_feature_is_within_0_and_1000_and_tells_times_apart(schedule) -> None:
    """Over the times that are trained: non-decreasing, and strictly increasing where sigma/alpha >= 0.002."""
    count = schedule.steps or 1000
    t = torch.arange(1, count + 1, dtype=torch.float64) / count
    feature = schedule.time_feature(torch.cat([tensor(0.0), t]))
    assert feature.min() >= 0
    assert feature.max() <= 1000
    assert (feature.diff() >= 0).all()
    seen = feature[1:][schedule.integral(t).expm1().sqrt() >= 0.002]
    assert len(seen) > 0.7 * count
    assert (seen.diff() > 0).all()


@pytest.mark.parametrize("case", CASES, ids=label)
def test_built_on_the_meta_device_it_still_has_its_values(case: tuple[str, dict]) -> None:
    t = tensor(0.0, 0.4, 0.9995, 1.0)
    with torch.device("meta"):
        schedule = build(case[0], **case[1])
    assert torch.equal(schedule.integral(t), build(case[0], **case[1]).integral(t))


# -- every schedule in continuous time against its published formula, at 40 digits --


def mp_linear(t: mpmath.mpf, low: str = "0.1", high: str = "20") -> mpmath.mpf:
    return mpmath.mpf(low) * t + (mpmath.mpf(high) - mpmath.mpf(low)) * t**2 / 2


def mp_cosine(t: mpmath.mpf) -> mpmath.mpf:
    s = 1 / mpmath.mpf(125)
    f, f_0 = (mpmath.cos((x + s) / (1 + s) * mpmath.pi / 2) ** 2 for x in (t, mpmath.mpf(0)))
    return -mpmath.log(f / f_0)


def mp_sigmoid(t: mpmath.mpf, start: str = "-3", end: str = "3", tau: str = "1", floor: str = "0") -> mpmath.mpf:
    """Jabri et al. 2023, algorithm 1, as printed."""
    first, last, temperature, least = (mpmath.mpf(value) for value in (start, end, tau, floor))

    def sigmoid(y: mpmath.mpf) -> mpmath.mpf:
        return 1 / (1 + mpmath.exp(-y / temperature))

    abar = (sigmoid(last) - sigmoid(t * (last - first) + first)) / (sigmoid(last) - sigmoid(first))
    return -mpmath.log(least + (1 - least) * abar)


def mp_ratio(r: mpmath.mpf) -> mpmath.mpf:
    return mpmath.log1p(r**2)


def mp_zero_snr(B: Callable[[mpmath.mpf], mpmath.mpf], t: mpmath.mpf) -> mpmath.mpf:
    """Lin et al. 2024 with alpha(0) = 1 kept."""
    alpha, end = mpmath.exp(-B(t) / 2), mpmath.exp(-B(mpmath.mpf(1)) / 2)
    return -2 * mpmath.log((alpha - end) / (1 - end))


PUBLISHED: list[tuple[str, dict, Callable[[mpmath.mpf], mpmath.mpf]]] = [
    ("constant", {}, lambda t: 8 * t),
    ("linear", {}, mp_linear),
    ("linear", {"zero_terminal_snr": True}, lambda t: mp_zero_snr(mp_linear, t)),
    (
        "linear",
        {"beta_max": 200.0, "zero_terminal_snr": True},
        lambda t: mp_zero_snr(lambda x: mp_linear(x, high="200"), t),
    ),
    ("cosine", {"zero_terminal_snr": True}, mp_cosine),
    ("sigmoid", {}, lambda t: mp_sigmoid(t, floor="1e-9")),
    ("sigmoid", {"zero_terminal_snr": True}, mp_sigmoid),
    ("sigmoid", {"start": 0.0, "tau": 0.25}, lambda t: mp_sigmoid(t, start="0", tau="0.25", floor="1e-9")),
    (
        "geometric",
        {},
        lambda t: mp_ratio(mpmath.mpf("0.01") * mpmath.sqrt(mpmath.mpf(5000) ** (2 * t) - 1)),
    ),
    ("edm", {}, lambda t: mp_ratio(80 * t**7)),
    ("flow", {}, lambda t: mp_ratio(t / (1 - t))),
    ("flow", {"shift": 3.0}, lambda t: mp_ratio(3 * t / (1 + 2 * t) / (1 - 3 * t / (1 + 2 * t)))),
]


@pytest.mark.parametrize("t", [1e-9, 1e-5, 0.001, 0.3, 0.5, 0.9, 0.999, 0.99999])
@pytest.mark.parametrize(("name", "fields", "exact"), PUBLISHED, ids=[f"{case[0]}-{case[1]}" for case in PUBLISHED])
def test_b_has_twelve_digits(name: str, fields: dict, exact: Callable[[mpmath.mpf], mpmath.mpf], t: float) -> None:
    with mpmath.workdps(80):  # 40 digits are left where 1 - 1e-18 is subtracted from 1
        expected = float(exact(mpmath.mpf(t)))
    assert build(name, **fields).integral(tensor(t)).item() == pytest.approx(expected, rel=1e-12, abs=0)


def test_every_continuous_schedule_has_a_published_answer() -> None:
    ours = {name for name in SCHEDULES.names() if type(build(name)).__module__.startswith("dvae.")}
    assert ours == {name for name, _, _ in PUBLISHED} | {"ddpm_linear", "scaled_linear"}


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


def test_scaled_linear_is_the_table_of_stable_diffusion() -> None:
    schedule = build("scaled_linear", beta_start=0.00085, beta_end=0.012)
    roots = schedule.betas.sqrt()
    torch.testing.assert_close(roots.diff(), (roots[-1] - roots[0]).expand(999) / 999, rtol=1e-9, atol=0)
    assert schedule.abar[-1].sqrt().item() == pytest.approx(0.068265, abs=5e-7)  # Lin et al. 2024, section 3.1


def test_ddpm_feature_is_the_index_of_the_table() -> None:
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(
        build("ddpm_linear").time_feature(t), torch.arange(1000, dtype=torch.float64), rtol=0, atol=1e-9
    )
    assert build("ddpm_linear", steps=100).time_feature(tensor(0.01, 1.0)).tolist() == pytest.approx([0.0, 990.0])


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


# -- zero terminal SNR --


@pytest.mark.parametrize(("start", "end", "steps"), [(1e-4, 0.02, 1000), (1e-3, 0.2, 100)])
def test_zero_terminal_table_differs_from_lin_et_al_by_a_constant_below_the_first_beta(
    start: float, end: float, steps: int
) -> None:
    fields = {"beta_start": start, "beta_end": end, "steps": steps}
    ours = build("ddpm_linear", zero_terminal_snr=True, **fields)
    # algorithm 1: shift and scale sqrt(abar) so that the last entry is 0 and the first is kept
    root = np.sqrt(np.cumprod(1 - np.linspace(start, end, steps)))
    table = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    difference = -np.log(table[:-1]) + np.log(ours.abar[:-1].numpy())
    constant = -2 * math.log(root[0] * (1 - root[-1]) / (root[0] - root[-1]))
    np.testing.assert_allclose(difference, constant, rtol=0, atol=1e-12)
    assert abs(constant) < 0.1 * start
    assert ours.abar[-1] == table[-1] == 0.0
    np.testing.assert_allclose(ours.betas, 1 - np.concatenate([ours.abar[:1], table[1:] / table[:-1]]), atol=1e-12)


def test_the_constant_is_as_documented() -> None:
    root = np.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    assert 2 * math.log(root[0] * (1 - root[-1]) / (root[0] - root[-1])) == pytest.approx(6.4e-7, rel=0.01)


@pytest.mark.parametrize("name", ["ddpm_linear", "linear"])
def test_zero_terminal_snr_rescales_alpha(name: str) -> None:
    """Between a table's times as well."""
    t = torch.linspace(0, 1, 3001, dtype=torch.float64)
    alpha = torch.exp(-0.5 * build(name).integral(t))
    rescaled = torch.exp(-0.5 * build(name, zero_terminal_snr=True).integral(t))
    torch.testing.assert_close(rescaled, (alpha - alpha[-1]) / (1 - alpha[-1]), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("name", "largest"), [("cosine", 3e-6), ("sigmoid", 1.001e-9)])
def test_zero_terminal_snr_of_curves_that_end_at_zero_only_lifts_their_cap(name: str, largest: float) -> None:
    t = torch.linspace(0, 1, 3001, dtype=torch.float64)
    with_cap, without = (torch.exp(-build(name, zero_terminal_snr=zero).integral(t)) for zero in (False, True))
    assert (with_cap - without).abs().max() <= largest
    assert without[-1] == 0.0


# -- linear --


def test_ddpm_table_converges_to_linear_at_first_order() -> None:
    """With n betas beta/n: n (B_n - B) -> 1/2 int beta^2 + (beta_max - beta_min) (t^2 - t) / 2, at rate 1/n."""
    t = tensor(0.1, 0.25, 0.5, 1.0)
    low, rise = 0.1, 19.9
    limit = (low**2 * t + low * rise * t**2 + rise**2 * t**3 / 3) / 2 + rise * (t**2 - t) / 2
    rest = []
    for n in (1000, 2000, 4000):
        table = build("ddpm_linear", steps=n, beta_start=low / n, beta_end=(low + rise) / n)
        rest.append(n * (table.integral(t) - build("linear").integral(t)) - limit)
    for coarse, fine in pairwise(rest):
        torch.testing.assert_close(coarse / fine, torch.full_like(t, 2.0), rtol=0.02, atol=0)
    assert (rest[-1].abs() < 0.01 * limit.abs()).all()


# -- sigma/alpha by hand --


def ratio(schedule, *t: float) -> list[float]:
    return schedule.integral(tensor(*t)).expm1().sqrt().tolist()


def test_flow_is_the_straight_path_scaled_to_unit_variance() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    B = build("flow").integral(t)
    alpha, sigma = torch.exp(-0.5 * B), torch.sqrt(-torch.expm1(-B))
    torch.testing.assert_close(alpha / (alpha + sigma), 1 - t, rtol=0, atol=1e-14)
    torch.testing.assert_close(sigma / (alpha + sigma), t, rtol=0, atol=1e-14)


def test_flow_tells_the_refiner_of_the_noise_whatever_the_shift() -> None:
    plain, shifted = build("flow"), build("flow", shift=3.0)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    same_noise = plain.inverse(shifted.integral(t))
    torch.testing.assert_close(shifted.time_feature(t), plain.time_feature(same_noise), rtol=1e-12, atol=0)
    assert shifted.time_feature(tensor(0.5)).item() == pytest.approx(750.0)  # 3 x 0.5 / (1 + 2 x 0.5)


def test_geometric_levels() -> None:
    levels = [0.01 * math.sqrt(5000.0 ** (2 * t) - 1) for t in (0.25, 0.5, 1.0)]
    assert ratio(build("geometric"), 0.0, 0.25, 0.5, 1.0) == pytest.approx([0.0, *levels], rel=1e-12)
    assert levels[-1] == pytest.approx(50.0, rel=1e-7)
    assert levels[1] == pytest.approx(math.sqrt(0.01 * 50.0), rel=1e-3)  # log-linear: halfway is the geometric mean


def test_edm_feature_is_the_papers_noise_embedding() -> None:
    """ln(sigma) / 4 at 0.002 is 0 and at 80 is 1000, affine in between."""
    schedule = build("edm")
    sigmas = np.geomspace(0.002, 80, 9)
    times = schedule.inverse(torch.from_numpy(np.log1p(sigmas**2)))
    np.testing.assert_allclose(schedule.time_feature(times), np.linspace(0, 1000, 9), atol=1e-9)
    assert schedule.time_feature(tensor(0.0, 0.1)).tolist() == [0.0, 0.0]
    assert schedule.time_feature(tensor(1.0)).item() == 1000.0


# -- presets and refusals --

PRESETS = sorted(path.stem for path in (Path(compose.__file__).parent / "recipes" / "schedule").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build(preset: str) -> None:
    schedule = SCHEDULES.build(compose.compose("train", [f"schedule={preset}"]).schedule, IO)
    assert schedule.integral(tensor(0.0)).item() == 0.0


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("constant", {"beta": 0.0}),
        ("constant", {"beta": float("inf")}),
        ("linear", {"beta_min": 0.0}),
        ("linear", {"beta_min": 21.0}),
        ("linear", {"beta_max": float("nan")}),
        ("sigmoid", {"tau": 0.0}),
        ("sigmoid", {"tau": float("nan")}),
        ("sigmoid", {"start": 3.0}),
        ("sigmoid", {"tau": 0.09}),
        ("geometric", {"sigma_min": 0.0}),
        ("geometric", {"sigma_max": 0.01}),
        ("edm", {"sigma_max": 0.002}),
        ("edm", {"rho": 0.5}),
        ("flow", {"shift": 0.0}),
        ("flow", {"shift": float("inf")}),
    ],
)
def test_refuses_in_one_line(name: str, fields: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"^schedule\.\w+=.*$"):
        build(name, **fields)
