"""Keep known pixels at every step of a sampler (Song et al. 2021b, appendix I.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dvae.diffusion.kernels import Diffusion, Matching
from dvae.diffusion.sampler_model import OnStep


def replace_known_pixels(
    diffusion: Diffusion, x0: torch.Tensor, known: torch.Tensor, noise: Callable[[int], torch.Tensor]
) -> OnStep:
    """Return an on_step function that overwrites the known pixels after each sampler step.

    The known pixels of every component of u are replaced by x0 with fresh noise at the noise level that the step has
    reached. At t = 0 they are replaced by x0 itself.

    Args:
        diffusion: the process.
        x0: the clean state, (B, C, H, W).
        known: bool (B, 1, H, W), true at known pixels.
        noise: noise(i) ~ N(0, I), of the shape of u; another i gives other noise.
    """

    def on_step(i: int, t: float, u: torch.Tensor) -> torch.Tensor:
        if t == 0.0:
            return torch.where(known, diffusion.initial_state(x0).to(u.dtype), u)
        # with denoising score matching, the other components of u_0 are random and need noise of their own
        start = noise(2 * i + 1) if diffusion.matching is Matching.dsm else None
        return torch.where(known, diffusion.perturb(diffusion.initial_state(x0, start), t, noise(2 * i)).to(u.dtype), u)

    return on_step
