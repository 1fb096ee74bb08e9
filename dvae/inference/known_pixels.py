"""Keep known pixels at every step of a sampler (Song et al. 2021b, appendix I.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dvae.diffusion.kernels import Diffusion, Matching
from dvae.diffusion.sampler_model import OnStep


def replace_known_pixels(
    diffusion: Diffusion, x0: torch.Tensor, known: torch.Tensor, noise: Callable[[int], torch.Tensor]
) -> OnStep:
    """An on_step that puts the known pixels, noised afresh to the level just reached, into every component of u.

    x0 (B, C, H, W) is the clean state, known (B, 1, H, W) bool; noise(i) ~ N(0, I) has the shape of u. At t = 0 the
    known pixels are x0 itself.
    """

    def on_step(i: int, t: float, u: torch.Tensor) -> torch.Tensor:
        if t == 0.0:
            return torch.where(known, diffusion.initial_state(x0).to(u.dtype), u)
        start = noise(2 * i + 1) if diffusion.matching is Matching.dsm else None
        return torch.where(known, diffusion.perturb(diffusion.initial_state(x0, start), t, noise(2 * i)).to(u.dtype), u)

    return on_step
