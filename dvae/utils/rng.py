"""Keyed randomness: every draw is a pure function of (seed, purpose, sample number).

So a draw depends neither on ranks, workers, batch size nor on what was drawn before, and a resumed run needs no
generator state. The generator is NumPy's Philox (Salmon et al. 2011), a counter-based one: the key is (seed, purpose),
the counter starts at the sample number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch


def generator(seed: int, purpose: str, sample: int = 0) -> np.random.Generator:
    """The generator of one sample for one purpose ("noise", "time", "order", ...)."""
    word = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    key = np.array([seed % 2**64, word], dtype=np.uint64)
    # the sample number goes in the second counter word: the first leaves 2**64 draws to each sample
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, sample, 0, 0], dtype=np.uint64)))


def normal(seed: int, purpose: str, samples: Iterable[int], shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal draws (B, *shape), float32, one row per sample number."""
    numbers = list(samples)
    rows = np.empty((len(numbers), math.prod(shape)), dtype=np.float32)
    if rows.size:  # there is nothing to draw of an empty latent
        for row, drawn in zip(rows, _generators(seed, purpose, numbers), strict=True):
            drawn.standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(rows.reshape(len(numbers), *shape))


def uniform(seed: int, purpose: str, samples: Iterable[int], shape: tuple[int, ...] = ()) -> torch.Tensor:
    """Uniform draws in [0, 1), (B, *shape), float64, one row per sample number."""
    numbers = list(samples)
    rows = np.empty((len(numbers), math.prod(shape)))
    for row, drawn in zip(rows, _generators(seed, purpose, numbers), strict=True):
        drawn.random(out=row)
    return torch.from_numpy(rows.reshape(len(numbers), *shape))


def _generators(seed: int, purpose: str, samples: list[int]) -> Iterator[np.random.Generator]:
    """generator(seed, purpose, s) for each s: one object, set to each sample in turn, since making one is slow."""
    made = generator(seed, purpose)
    state = made.bit_generator.state
    for sample in samples:
        state["state"]["counter"][1] = sample
        made.bit_generator.state = state
        yield made


def child(seed: int, purpose: str) -> int:
    """A seed derived from `seed` for one purpose, below 2**62."""
    return int(generator(seed, purpose).integers(2**62))
