"""Two-dimensional densities, as images of one pixel with two channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.special import ndtr, ndtri

from dvae.errors import UserError, suggest
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.sources.base import SOURCES, StreamSource
from dvae.utils import rng

UNIFORMS = 4
"""Uniform draws that a density may use per point."""
CUT = 4.0
"""Standard deviations at which the noise around curves and centers is cut off, so that every density has a bound."""

Density = Callable[[np.ndarray], np.ndarray]
"""Points (B, 2) in [-1, 1] as a function of uniform draws (B, UNIFORMS) in [0, 1)."""


def rings(u: np.ndarray) -> np.ndarray:
    """Three circles of radius 0.25, 0.55 and 0.85, alike in weight, with noise of deviation 0.03 across."""
    radius = np.array([0.25, 0.55, 0.85])[_choice(u[:, 0], 3)] + 0.03 * _normal(u[:, 1])
    return _polar(radius, 2 * math.pi * u[:, 2])


def moons(u: np.ndarray) -> np.ndarray:
    """Two interleaved half circles of radius 0.55, noise of deviation 0.03 (scikit-learn's make_moons, centered)."""
    half = _choice(u[:, 0], 2)
    points = _polar(0.55, math.pi * (u[:, 1] + half)) + np.where(half[:, None], [0.275, 0.1375], [-0.275, -0.1375])
    return points + 0.03 * _normal(u[:, 2:])


def checkerboard(u: np.ndarray) -> np.ndarray:
    """Uniform on the eight dark squares, 0.45 wide, of a board of four by four (Grathwohl et al. 2019)."""
    square = _choice(u[:, 0], 8)
    row = square // 2
    column = 2 * (square % 2) + row % 2
    return 0.45 * (np.stack([column, row], 1) + u[:, 1:3] - 2.0)


def spirals(u: np.ndarray) -> np.ndarray:
    """Two arms of one and a half turns, noise of deviation 0.03 (Grathwohl et al. 2019, of other turns and noise)."""
    turned = np.sqrt(u[:, 1])  # so that points lie about evenly along an arm
    points = _polar(0.88 * turned, 3 * math.pi * turned + math.pi * _choice(u[:, 0], 2))
    return points + 0.03 * _normal(u[:, 2:])


def pinwheel(u: np.ndarray) -> np.ndarray:
    """Five Gaussians, stretched along a radius and then twisted about the origin (Johnson et al. 2016)."""
    along, across = 0.45 + 0.11 * _normal(u[:, 1]), 0.04 * _normal(u[:, 2])
    radius = np.hypot(along, across)
    angle = np.arctan2(across, along) + 2 * math.pi / 5 * _choice(u[:, 0], 5) + 2.2 * (radius - 0.45)
    return _polar(radius, angle)


def gaussians(u: np.ndarray) -> np.ndarray:
    """Eight Gaussians of deviation 0.05 around a circle of radius 0.75 (Grathwohl et al. 2019)."""
    return _polar(np.full(len(u), 0.75), 2 * math.pi / 8 * _choice(u[:, 0], 8)) + 0.05 * _normal(u[:, 1:3])


DENSITIES: dict[str, Density] = {
    density.__name__: density for density in (rings, moons, checkerboard, spirals, pinwheel, gaussians)
}


@SOURCES.register("toy2d")
class Toy2D(StreamSource):
    """Points of known 2-D densities, one class each: (2, 1, 1) "images" in [-1, 1], without end."""

    license = "CC0"

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        densities: list[str] = field(default_factory=lambda: list(DENSITIES))
        """rings | moons | checkerboard | spirals | pinwheel | gaussians; label i is the i-th of them."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        unknown = [name for name in config.densities if name not in DENSITIES]
        if unknown:
            raise UserError(f"source.densities: unknown density {unknown[0]!r}: {suggest(unknown[0], DENSITIES)}")
        if not config.densities or len(set(config.densities)) < len(config.densities):
            raise UserError(f"source.densities={config.densities}: name one or more, each once")
        if (shapes.channels, shapes.image_size) != (2, 1):
            raise UserError(
                "source toy2d draws points: set image_size=1 and channels=2, "
                f"not {shapes.image_size} and {shapes.channels}"
            )
        self.classes = tuple(config.densities)

    def sample(self, seed: int, numbers: Sequence[int], label: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        uniforms = rng.uniform(seed, "toy2d", numbers, (UNIFORMS,)).numpy()
        labels = np.asarray(numbers) % len(self.classes) if label is None else np.full(len(numbers), label)
        points = np.empty((len(numbers), 2))
        for i, name in enumerate(self.classes):
            points[labels == i] = DENSITIES[name](uniforms[labels == i])
        x = torch.from_numpy(points.astype(np.float32)).view(-1, 2, 1, 1)
        return x, torch.from_numpy(labels.astype(np.int64))


def _choice(u: np.ndarray, n: int) -> np.ndarray:
    """One of 0..n-1, alike in weight."""
    return (u * n).astype(np.int64)


def _normal(u: np.ndarray) -> np.ndarray:
    """Standard normal, cut off at -CUT and CUT."""
    tail = ndtr(-CUT)
    return ndtri(tail + (1.0 - 2.0 * tail) * u)


def _polar(radius: np.ndarray | float, angle: np.ndarray) -> np.ndarray:
    """Points (B, 2) of polar coordinates."""
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
