"""Two-dimensional toy densities. A point is an image of one pixel with two channels."""

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
"""Number of uniform random numbers that a density can use for one point."""
CUT = 4.0
"""Standard deviations at which the noise around curves and centers is truncated.

All densities are therefore bounded in space.
"""

Density = Callable[[np.ndarray], np.ndarray]
"""Function from uniform random numbers (B, UNIFORMS) in [0, 1) to points (B, 2) in [-1, 1]."""


def rings(u: np.ndarray) -> np.ndarray:
    """Three circles of radius 0.25, 0.55 and 0.85, with equal weights and radial noise of std 0.03."""
    radius = np.array([0.25, 0.55, 0.85])[_choice(u[:, 0], 3)] + 0.03 * _normal(u[:, 1])
    return _polar(radius, 2 * math.pi * u[:, 2])


def moons(u: np.ndarray) -> np.ndarray:
    """Two interleaved half circles of radius 0.55 with noise of std 0.03 (scikit-learn's make_moons, centered)."""
    half = _choice(u[:, 0], 2)
    points = _polar(0.55, math.pi * (u[:, 1] + half)) + np.where(half[:, None], [0.275, 0.1375], [-0.275, -0.1375])
    return points + 0.03 * _normal(u[:, 2:])


def checkerboard(u: np.ndarray) -> np.ndarray:
    """Uniform density on the eight dark squares, 0.45 wide, of a 4x4 board (Grathwohl et al. 2019)."""
    square = _choice(u[:, 0], 8)
    row = square // 2
    column = 2 * (square % 2) + row % 2
    return 0.45 * (np.stack([column, row], 1) + u[:, 1:3] - 2.0)


def spirals(u: np.ndarray) -> np.ndarray:
    """Two spiral arms of one and a half turns with noise of std 0.03.

    Grathwohl et al. 2019 use another number of turns and other noise.
    """
    turned = np.sqrt(u[:, 1])  # the square root spreads the points about evenly along an arm
    points = _polar(0.88 * turned, 3 * math.pi * turned + math.pi * _choice(u[:, 0], 2))
    return points + 0.03 * _normal(u[:, 2:])


def pinwheel(u: np.ndarray) -> np.ndarray:
    """Five Gaussians that are stretched along a radius and twisted about the origin (Johnson et al. 2016)."""
    along, across = 0.45 + 0.11 * _normal(u[:, 1]), 0.04 * _normal(u[:, 2])
    radius = np.hypot(along, across)
    angle = np.arctan2(across, along) + 2 * math.pi / 5 * _choice(u[:, 0], 5) + 2.2 * (radius - 0.45)
    return _polar(radius, angle)


def gaussians(u: np.ndarray) -> np.ndarray:
    """Eight Gaussians of std 0.05 with centers on a circle of radius 0.75 (Grathwohl et al. 2019)."""
    return _polar(np.full(len(u), 0.75), 2 * math.pi / 8 * _choice(u[:, 0], 8)) + 0.05 * _normal(u[:, 1:3])


DENSITIES: dict[str, Density] = {
    density.__name__: density for density in (rings, moons, checkerboard, spirals, pinwheel, gaussians)
}


@SOURCES.register("toy2d")
class Toy2D(StreamSource):
    """Any number of points from known 2-D densities. Each density is one class.

    A point is an "image" of shape (2, 1, 1) in [-1, 1].
    """

    license = "CC0"

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        densities: list[str] = field(default_factory=lambda: list(DENSITIES))
        """Densities: rings | moons | checkerboard | spirals | pinwheel | gaussians. Label i is the i-th in the list."""

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
    """Map uniform random numbers in [0, 1) to integers 0..n-1 with equal probability."""
    return (u * n).astype(np.int64)


def _normal(u: np.ndarray) -> np.ndarray:
    """Map uniform random numbers to a standard normal distribution that is truncated at -CUT and CUT."""
    tail = ndtr(-CUT)
    return ndtri(tail + (1.0 - 2.0 * tail) * u)


def _polar(radius: np.ndarray | float, angle: np.ndarray) -> np.ndarray:
    """Return the points (B, 2) of polar coordinates."""
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
