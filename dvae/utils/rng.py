"""Keyed random numbers: every draw is a pure function of (seed, purpose, sample number).

A draw does not depend on ranks, workers, the batch size or earlier draws. A resumed run therefore needs no generator
state. The generator is NumPy's counter-based Philox (Salmon et al. 2011). Its key is (seed, purpose), and its counter
starts at the sample number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch


def generator(seed: int, purpose: str, sample: int = 0) -> np.random.Generator:
    """Return the generator of one sample for one purpose ("noise", "time", "order", ...)."""
    word = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    key = np.array([seed % 2**64, word], dtype=np.uint64)
    # The sample number is the second 64-bit word of the counter. The first word counts the draws within a sample, so
    # each sample has 2**64 counter values of its own and samples never overlap.
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, sample, 0, 0], dtype=np.uint64)))


def normal(seed: int, purpose: str, samples: Iterable[int], shape: tuple[int, ...]) -> torch.Tensor:
    """Return standard normal draws (B, *shape), float32, one row per sample number."""
    numbers = list(samples)
    rows = np.empty((len(numbers), math.prod(shape)), dtype=np.float32)
    if rows.size:  # an empty latent has no values to draw
        for row, drawn in zip(rows, _generators(seed, purpose, numbers), strict=True):
            drawn.standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(rows.reshape(len(numbers), *shape))


def uniform(seed: int, purpose: str, samples: Iterable[int], shape: tuple[int, ...] = ()) -> torch.Tensor:
    """Return uniform draws in [0, 1), (B, *shape), float64, one row per sample number."""
    numbers = list(samples)
    rows = np.empty((len(numbers), math.prod(shape)))
    for row, drawn in zip(rows, _generators(seed, purpose, numbers), strict=True):
        drawn.random(out=row)
    return torch.from_numpy(rows.reshape(len(numbers), *shape))


def _generators(seed: int, purpose: str, samples: list[int]) -> Iterator[np.random.Generator]:
    """Yield a generator in the state of generator(seed, purpose, s) for each sample s.

    All samples share one object, because creating a generator is slow. Use each one before you ask for the next.
    """
    made = generator(seed, purpose)
    state = made.bit_generator.state
    for sample in samples:
        state["state"]["counter"][1] = sample
        made.bit_generator.state = state
        yield made


def child(seed: int, purpose: str) -> int:
    """Return a seed in [0, 2**62) that is derived from `seed` for one purpose."""
    return int(generator(seed, purpose).integers(2**62))
