"""Sliced Wasserstein distance between two sets of points (Rabin et al. 2012, Bonneel et al. 2015)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from dvae.utils import rng

DIRECTIONS = 256
"""Number of random directions over which the distance is averaged."""

Draw = Callable[[int, int], torch.Tensor]
"""draw(n, seed) returns n independent points (n, d)."""


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor, directions: int = DIRECTIONS, seed: int = 0) -> float:
    """Sliced Wasserstein distance SW2 between points a (n, d) and b (m, d), in the unit of the points.

    It is the root of the mean of W2(a e, b e)^2 over unit vectors e (Bonneel et al. 2015, equation 10). The mean is a
    Monte Carlo estimate over `directions` random vectors. The distances in one dimension are exact. The same seed gives
    the same directions.
    """
    e = rng.normal(seed, "sliced Wasserstein", range(directions), (a.shape[1],)).double()
    e = (e / e.norm(dim=1, keepdim=True)).T
    return math.sqrt(float(wasserstein_squared(a.cpu().double() @ e, b.cpu().double() @ e).mean()))


def wasserstein_squared(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Exact squared Wasserstein distances W2^2, (k,), between the columns of a (n, k) and b (m, k).

    Each column is a set of numbers with equal weights. W2^2 is the integral over q in (0, 1) of the squared difference
    of the q-quantiles of a and b. The integrand is constant between neighboring multiples of 1/n and 1/m.
    """
    n, m = len(a), len(b)
    steps = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)  # in units of 1 / (n m): integers are exact
    low = torch.from_numpy(steps[:-1])
    width = torch.from_numpy(np.diff(steps)).to(a.dtype) / (n * m)
    gap = a.sort(dim=0).values[low // m] - b.sort(dim=0).values[low // n]
    return (gap.square() * width[:, None]).sum(0)


def two_sample_floor(draw: Draw, n: int, repeats: int = 5) -> list[float]:
    """SW2 between two independent sets of n true points, `repeats` times. This is the score of a perfect model."""
    return [sliced_wasserstein(draw(n, 2 * i), draw(n, 2 * i + 1)) for i in range(repeats)]
