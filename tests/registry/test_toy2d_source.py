"""The 2-D densities: bounds, known moments and supports, and draws that depend on their key alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvae.errors import UserError
from dvae.registry.core import Shapes
from dvae.registry.sources.base import SOURCES, StreamSource
from dvae.registry.sources.toy2d import CUT, DENSITIES

POINT = Shapes(image_size=1, channels=2)
N = 20_000


def make(**fields: object) -> StreamSource:
    return SOURCES.build({"name": "toy2d", **fields}, POINT)


def points(density: str, n: int = N) -> np.ndarray:
    """(n, 2)."""
    return make(densities=[density]).sample(0, range(n))[0].flatten(1).double().numpy()


@pytest.mark.parametrize("density", DENSITIES)
def test_points_are_bounded_images_and_centered_nearly(density: str) -> None:
    x, labels = make(densities=[density]).sample(3, range(N))
    assert x.shape == (N, 2, 1, 1)
    assert x.dtype == torch.float32
    assert x.abs().max() <= 1.0
    assert labels.dtype == torch.int64
    assert not labels.any()
    assert x.std() > 0.25
    assert torch.all(x.mean((0, 2, 3)).abs() < 5 * 0.6 / math.sqrt(N))  # each is symmetric about the origin


@given(st.integers(0, 2**40), st.lists(st.integers(0, 2**50), min_size=1, max_size=9), st.sampled_from([None, 0, 4]))
@settings(max_examples=25, deadline=None)
def test_a_sample_depends_on_its_key_alone(seed: int, numbers: list[int], label: int | None) -> None:
    source = make()
    x, labels = source.sample(seed, numbers, label)
    for i, number in enumerate(numbers):
        alone, its = source.sample(seed, [number], label)
        assert torch.equal(alone[0], x[i])
        assert its.item() == labels[i].item() == (number % 6 if label is None else label)


def test_seeds_and_numbers_differ() -> None:
    source = make()
    assert len({tuple(p) for seed in (0, 1) for p in source.sample(seed, range(50))[0].flatten(1).tolist()}) == 100


def test_rings_lie_on_their_circles() -> None:
    radius = np.linalg.norm(points("rings"), axis=1)
    ring = np.abs(radius[:, None] - [0.25, 0.55, 0.85]).argmin(1)
    away = radius - np.array([0.25, 0.55, 0.85])[ring]
    assert np.abs(away).max() <= CUT * 0.03 + 1e-6
    assert away.std() == pytest.approx(0.03, rel=0.03)
    assert np.bincount(ring) / N == pytest.approx([1 / 3] * 3, abs=0.015)


def test_moons_are_two_half_circles() -> None:
    p = points("moons")
    centers = np.array([[0.275, 0.1375], [-0.275, -0.1375]])
    across = np.linalg.norm(p[:, None] - centers, axis=2) - 0.55
    above = p[:, None, 1] - centers[None, :, 1] >= 0  # the second moon is the lower half of a circle about the first
    right_half = np.stack([~above[:, 0], above[:, 1]], 1) | (np.abs(p[:, None, 1] - centers[None, :, 1]) < CUT * 0.03)
    nearest = np.where(right_half, np.abs(across), np.inf).min(1)
    assert nearest.max() <= CUT * 0.03 * math.sqrt(2)


def test_the_checkerboard_is_uniform_on_its_dark_squares() -> None:
    p = points("checkerboard")
    cells = np.floor((p + 0.9) / 0.45).astype(int).clip(0, 3)
    assert not ((cells.sum(1)) % 2).any()
    assert p.var(0) == pytest.approx([0.9**2 / 3] * 2, rel=0.03)  # each coordinate alone is uniform on [-0.9, 0.9]
    counts = np.bincount(cells[:, 0] * 4 + cells[:, 1], minlength=16)
    assert counts[counts > 0] / N == pytest.approx([1 / 8] * 8, abs=0.012)


def test_spirals_turn_once_and_a_half() -> None:
    p = points("spirals")
    radius, angle = np.linalg.norm(p, axis=1), np.arctan2(p[:, 1], p[:, 0])
    far = radius > 0.3
    off = (angle - 3 * math.pi * radius / 0.88)[far]
    off = (off + math.pi / 2) % math.pi - math.pi / 2  # two arms, half a turn apart
    pitch = 0.88 / (3 * math.pi)  # the radius gained per radian
    across = off * pitch * radius[far] / np.hypot(radius[far], pitch)
    assert across.std() == pytest.approx(0.03, rel=0.05)
    assert np.abs(across).max() < 1.1 * math.sqrt(2) * CUT * 0.03
    assert (radius**2).mean() == pytest.approx(0.88**2 / 2 + 2 * 0.03**2, rel=0.02)


@pytest.mark.parametrize(("density", "fold"), [("pinwheel", 5), ("gaussians", 8)])
def test_symmetry(density: str, fold: int) -> None:
    z = points(density) @ np.array([1.0, 1.0j])
    for power in range(1, fold):
        assert abs((z**power).mean()) < 5 * math.sqrt((np.abs(z) ** (2 * power)).mean() / N), power
    assert abs((z**fold).mean()) > 10 * math.sqrt((np.abs(z) ** (2 * fold)).mean() / N)


def test_gaussians_have_their_deviation() -> None:
    p = points("gaussians")
    angle = np.round(np.arctan2(p[:, 1], p[:, 0]) / (math.pi / 4)) * math.pi / 4
    away = p - 0.75 * np.stack([np.cos(angle), np.sin(angle)], 1)
    assert away.std(0) == pytest.approx([0.05] * 2, rel=0.03)
    assert np.abs(away).max() <= CUT * 0.05 + 1e-6


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"densities": ["moon"]}, "did you mean 'moons'"),
        ({"densities": []}, "name one or more"),
        ({"densities": ["moons", "moons"]}, "each once"),
    ],
)
def test_wrong_densities_are_refused(fields: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make(**fields)


def test_points_are_no_pictures() -> None:
    with pytest.raises(UserError, match="image_size=1 and channels=2"):
        SOURCES.build({"name": "toy2d"}, Shapes(image_size=32))
    for use in (len, lambda source: source[0]):
        with pytest.raises(UserError, match="toy2d generates its samples"):
            use(make())
