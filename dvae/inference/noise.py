"""The noise that images are refined with: each image's own, another's, or one on the way between two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

import torch

from dvae.errors import UserError, suggest
from dvae.utils import rng

PARALLEL = 1e-6
"""Sine of the angle between two vectors below which the arc between them is taken for a straight line."""


class Shared(Enum):
    """What all images of a request take from image 0 of the seed."""

    z = "z"
    """z, and the class: only the noise varies."""
    noise = "noise"
    """All noise of refinement: only z, and the class, vary."""


class Between(Enum):
    """What is interpolated between two images; the other is that of the first."""

    z = "z"
    noise = "noise"
    both = "both"


Named = TypeVar("Named", bound=Enum)


def named(kind: type[Named], value: Named | str, word: str) -> Named:
    """The member of that name. Raises UserError, with those that there are."""
    if isinstance(value, kind):
        return value
    if value not in kind.__members__:
        raise UserError(f"{word}={value}: {suggest(str(value), kind.__members__)}")
    return kind[str(value)]


@dataclass(frozen=True)
class Noise:
    """Keyed noise of a batch of images: for every purpose that of the image `numbers[i]` of the seed; with `towards`,
    at the share `weights[i]` of the arc from it to that of `towards[i]`."""

    seed: int
    numbers: Sequence[int]
    towards: Sequence[int] | None = None
    weights: Sequence[float] | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: Sequence[int]) -> Noise:
        """That of some of the images."""
        numbers = [self.numbers[row] for row in rows]
        if self.towards is None or self.weights is None:
            return Noise(self.seed, numbers)
        return Noise(self.seed, numbers, [self.towards[row] for row in rows], [self.weights[row] for row in rows])

    def draw(self, purpose: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal noise (n, *shape), float32."""
        here = rng.normal(self.seed, purpose, self.numbers, shape)
        if self.towards is None or self.weights is None:
            return here
        there = rng.normal(self.seed, purpose, self.towards, shape)
        return spherical(here, there, torch.tensor(self.weights, dtype=torch.float64))


def linear(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(1 - weight) a + weight b, of a and b (n, ...) at weight (n,) in [0, 1]; exactly a at 0, and b at 1."""
    w = weight.to(a.device).view(-1, *[1] * (a.ndim - 1))
    return ((1.0 - w) * a + w * b).to(a.dtype)


def spherical(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The arc from a to b, both (n, ...), at weight (n,) in [0, 1]; exactly a at 0, and b at 1.

    sin((1 - w) angle) / sin(angle) a + sin(w angle) / sin(angle) b (Shoemake 1985; Song et al. 2021, DDIM, appendix
    D.5). Normal vectors of many dimensions have nearly the same length, and so has all that lies on the arc; the middle
    of a straight line is shorter by the root of 2. Where a and b are parallel the line is taken.
    """
    if a[0].numel() == 0:
        return a
    flat_a, flat_b = a.double().flatten(1), b.double().flatten(1)
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1.0, 1.0)
    angle = torch.acos(cosine)
    sine, w = torch.sin(angle), weight.to(a.device)
    straight = sine < PARALLEL
    safe = torch.where(straight, 1.0, sine)
    of_a = torch.where(straight, 1.0 - w, torch.sin((1.0 - w) * angle) / safe)
    of_b = torch.where(straight, w, torch.sin(w * angle) / safe)
    return (of_a[:, None] * flat_a + of_b[:, None] * flat_b).view_as(a).to(a.dtype)
