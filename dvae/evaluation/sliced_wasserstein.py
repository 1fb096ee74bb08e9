"""Sliced Wasserstein distance between two sets of points (Rabin et al. 2012, Bonneel et al. 2015)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from dvae.utils import rng

DIRECTIONS = 256
"""Random directions that the distance is a mean over."""

Draw = Callable[[int, int], torch.Tensor]
"""draw(n, seed): n independent points (n, d)."""


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor, directions: int = DIRECTIONS, seed: int = 0) -> float:
    """SW2 between points a (n, d) and b (m, d), in their unit.

    The root of the mean, over unit vectors e, of W2(a e, b e)^2: equation 10 of Bonneel et al. 2015 by Monte Carlo over
    e, with the 1-D distances exact. The same seed gives the same directions.
    """
    e = rng.normal(seed, "sliced Wasserstein", range(directions), (a.shape[1],)).double()
    e = (e / e.norm(dim=1, keepdim=True)).T
    return math.sqrt(float(wasserstein_squared(a.cpu().double() @ e, b.cpu().double() @ e).mean()))


def wasserstein_squared(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """W2^2 between the columns of a (n, k) and of b (m, k), each a set of equally heavy numbers: (k,), exact.

    It is the integral over q in (0, 1) of (quantile of a - quantile of b)^2, which is constant between the i/n and j/m.
    """
    n, m = len(a), len(b)
    steps = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)  # in units of 1 / (n m), so that they are integers
    low = torch.from_numpy(steps[:-1])
    width = torch.from_numpy(np.diff(steps)).to(a.dtype) / (n * m)
    gap = a.sort(dim=0).values[low // m] - b.sort(dim=0).values[low // n]
    return (gap.square() * width[:, None]).sum(0)


def two_sample_floor(draw: Draw, n: int, repeats: int = 5) -> list[float]:
    """SW2 between independent sets of n true points, `repeats` times: what a perfect model scores."""
    return [sliced_wasserstein(draw(n, 2 * i), draw(n, 2 * i + 1)) for i in range(repeats)]
