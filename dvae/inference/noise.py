"""The noise that images are refined with: an image's own noise, another image's, or an interpolation of two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

import torch

from dvae.errors import UserError, suggest
from dvae.utils import rng

MIN_SINE = 1e-6
"""If the sine of the angle between two vectors is below this, a straight line replaces the arc between them."""


class SharedVariable(Enum):
    """What all images of a request take from image 0 of the seed."""

    z = "z"
    """z and the class. Only the noise varies."""
    noise = "noise"
    """All noise of refinement. Only z and the class vary."""


class InterpolationSpace(Enum):
    """What is interpolated between two images. The rest is taken from the first image."""

    z = "z"
    noise = "noise"
    both = "both"


EnumType = TypeVar("EnumType", bound=Enum)


def parse_enum(enum: type[EnumType], value: EnumType | str, setting: str) -> EnumType:
    """Return the member with this name. Raises UserError, which lists the members, if there is none."""
    if isinstance(value, enum):
        return value
    if value not in enum.__members__:
        raise UserError(f"{setting}={value}: {suggest(str(value), enum.__members__)}")
    return enum[str(value)]


@dataclass(frozen=True)
class KeyedNoise:
    """Noise of a batch of images, computed from the seed, a purpose and the image number.

    With `targets` and `weights` the noise is interpolated along the arc between the noise of two images.
    """

    seed: int
    numbers: Sequence[int]
    """For each image, the image number of the seed whose noise it uses."""
    targets: Sequence[int] | None = None
    """For each image, the image number whose noise is at the end of the arc."""
    weights: Sequence[float] | None = None
    """For each image, the position on the arc, in [0, 1]: 0 is `numbers`, 1 is `targets`."""

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: Sequence[int]) -> KeyedNoise:
        """Select the noise of some of the images."""
        numbers = [self.numbers[row] for row in rows]
        if self.targets is None or self.weights is None:
            return KeyedNoise(self.seed, numbers)
        return KeyedNoise(self.seed, numbers, [self.targets[row] for row in rows], [self.weights[row] for row in rows])

    def sample(self, purpose: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return standard normal noise (n, *shape), float32."""
        noise = rng.normal(self.seed, purpose, self.numbers, shape)
        if self.targets is None or self.weights is None:
            return noise
        target_noise = rng.normal(self.seed, purpose, self.targets, shape)
        return slerp(noise, target_noise, torch.tensor(self.weights, dtype=torch.float64))


def lerp(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Interpolate linearly: (1 - weight) a + weight b.

    a and b are (n, ...), weight is (n,) in [0, 1]. The result is exactly a at weight 0 and exactly b at weight 1.
    """
    w = weight.to(a.device).view(-1, *[1] * (a.ndim - 1))
    return ((1.0 - w) * a + w * b).to(a.dtype)


def slerp(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Interpolate along the arc from a to b (Shoemake 1985; Song et al. 2021, DDIM, appendix D.5).

    With w = weight, this is sin((1 - w) angle) / sin(angle) a + sin(w angle) / sin(angle) b.

    a and b are (n, ...), weight is (n,) in [0, 1]. The result is exactly a at weight 0 and exactly b at weight 1.
    High-dimensional normal vectors have nearly the same length, and so have the points on the arc. The middle of a
    straight line is shorter by a factor of sqrt(2). If a and b are parallel, the straight line is used.
    """
    if a[0].numel() == 0:
        return a
    flat_a, flat_b = a.double().flatten(1), b.double().flatten(1)
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1.0, 1.0)
    angle = torch.acos(cosine)
    sine, w = torch.sin(angle), weight.to(a.device)
    parallel = sine < MIN_SINE  # the division by sine would amplify rounding errors
    safe = torch.where(parallel, 1.0, sine)
    weight_a = torch.where(parallel, 1.0 - w, torch.sin((1.0 - w) * angle) / safe)
    weight_b = torch.where(parallel, w, torch.sin(w * angle) / safe)
    return (weight_a[:, None] * flat_a + weight_b[:, None] * flat_b).view_as(a).to(a.dtype)
