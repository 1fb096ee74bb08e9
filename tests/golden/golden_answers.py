"""Known answers of keyed randomness: an implementation of its own, which shares no line with the package."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

FUNCTIONS = ("generator", "normal", "uniform", "child")
"""Golden names of the functions of keyed randomness."""
SAMPLES = (0, 1)
"""Sample numbers of the known answers; the seed is 0."""
COUNT = 2
"""Numbers that are drawn for each sample."""


def key(purpose: str) -> int:
    """The second word of a purpose's Philox key: the first eight bytes of its SHA-256, little-endian."""
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")


def philox(purpose: str, sample: int) -> np.random.Generator:
    """Seed 0; the sample number is the second word of the counter."""
    words = np.array([0, key(purpose)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=words, counter=np.array([0, sample, 0, 0], dtype=np.uint64)))


def answer(function: str, purpose: str) -> Any:
    """What a function of keyed randomness draws for seed 0: for each sample, or once for the whole."""
    if function == "child":
        return int(philox(purpose, 0).integers(2**62))
    if function == "generator":
        return [[int(word) for word in philox(purpose, sample).bit_generator.random_raw(COUNT)] for sample in SAMPLES]
    if function == "normal":
        return [philox(purpose, sample).standard_normal(COUNT, dtype=np.float32).tolist() for sample in SAMPLES]
    return [philox(purpose, sample).random(COUNT).tolist() for sample in SAMPLES]


def drawn(module: Any, name: str, function: str, purpose: str) -> Any:
    """The same from the package: `name` is what its module calls `function` today."""
    call = getattr(module, name)
    if function == "child":
        return call(0, purpose)
    if function == "generator":
        return [[int(w) for w in call(0, purpose, sample).bit_generator.random_raw(COUNT)] for sample in SAMPLES]
    return call(0, purpose, list(SAMPLES), (COUNT,)).tolist()
