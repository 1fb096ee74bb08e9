"""The noise that images are refined with: each image's own, another's, or one on the way between two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

import torch

from dvae.errors import UserError, suggest
from dvae.utils import rng

MIN_SINE = 1e-6
"""Sine of the angle between two vectors below which the arc between them is taken for a straight line."""


class SharedVariable(Enum):
    """What all images of a request take from image 0 of the seed."""

    z = "z"
    """z, and the class: only the noise varies."""
    noise = "noise"
    """All noise of refinement: only z, and the class, vary."""


class InterpolationSpace(Enum):
    """What is interpolated between two images; z or noise that is not interpolated is that of the first image."""

    z = "z"
    noise = "noise"
    both = "both"


EnumType = TypeVar("EnumType", bound=Enum)


def parse_enum(enum: type[EnumType], value: EnumType | str, setting: str) -> EnumType:
    """The member of that name. Raises UserError, which lists the members, if there is none."""
    if isinstance(value, enum):
        return value
    if value not in enum.__members__:
        raise UserError(f"{setting}={value}: {suggest(str(value), enum.__members__)}")
    return enum[str(value)]


@dataclass(frozen=True)
class KeyedNoise:
    """Keyed noise of a batch of images: for every purpose that of the image `numbers[i]` of the seed.

    With `targets` it is interpolated: at the share `weights[i]` of the arc from there to the noise of `targets[i]`.
    """

    seed: int
    numbers: Sequence[int]
    targets: Sequence[int] | None = None
    weights: Sequence[float] | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: Sequence[int]) -> KeyedNoise:
        """The noise of some of the images."""
        numbers = [self.numbers[row] for row in rows]
        if self.targets is None or self.weights is None:
            return KeyedNoise(self.seed, numbers)
        return KeyedNoise(self.seed, numbers, [self.targets[row] for row in rows], [self.weights[row] for row in rows])

    def sample(self, purpose: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal noise (n, *shape), float32."""
        noise = rng.normal(self.seed, purpose, self.numbers, shape)
        if self.targets is None or self.weights is None:
            return noise
        target_noise = rng.normal(self.seed, purpose, self.targets, shape)
        return slerp(noise, target_noise, torch.tensor(self.weights, dtype=torch.float64))


def lerp(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(1 - weight) a + weight b, of a and b (n, ...) at weight (n,) in [0, 1]; exactly a at 0, and b at 1."""
    w = weight.to(a.device).view(-1, *[1] * (a.ndim - 1))
    return ((1.0 - w) * a + w * b).to(a.dtype)


def slerp(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
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
    parallel = sine < MIN_SINE
    safe = torch.where(parallel, 1.0, sine)
    weight_a = torch.where(parallel, 1.0 - w, torch.sin((1.0 - w) * angle) / safe)
    weight_b = torch.where(parallel, w, torch.sin(w * angle) / safe)
    return (weight_a[:, None] * flat_a + weight_b[:, None] * flat_b).view_as(a).to(a.dtype)
