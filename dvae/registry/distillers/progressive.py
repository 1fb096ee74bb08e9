"""Progressive distillation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dvae.diffusion.conditioning import Conditioning
from dvae.diffusion.denoiser import Denoiser
from dvae.diffusion.kernels import Diffusion
from dvae.diffusion.time_grid import Spacing, time_grid
from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.distillers.base import DISTILLERS, Distiller


@DISTILLERS.register("progressive")
class ProgressiveDistillation(Distiller):
    """One step of the student is two of the teacher's DDIM, and the student is the next round's teacher (Salimans & Ho
    2022, algorithm 2). Its sampler is sampler=ddim with uniform spacing and as many steps as the round's."""

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        start: int = 64
        """Steps of the first teacher."""
        end: int = 4
        """Steps of the last student: start, halved some times."""

    targets_from_student = False

    def __init__(self, config: Config, shapes: Shapes) -> None:
        rounds, steps = [], config.start
        while steps > max(config.end, 1) and steps % 2 == 0:
            steps //= 2
            rounds.append(steps)
        if not rounds or steps != config.end:
            raise UserError(
                f"distiller.start={config.start}, distiller.end={config.end}: the first halved some times must be the "
                "second, as 64 and 4"
            )
        self._rounds = tuple(rounds)

    @property
    def rounds(self) -> tuple[int, ...]:
        return self._rounds

    def times(
        self, diffusion: Diffusion, steps: int, uniform: torch.Tensor, progress: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        grid = torch.tensor(time_grid(diffusion.schedule, steps, Spacing.uniform), dtype=torch.float64)
        chosen = (uniform * (len(grid) - 1)).long()
        return grid[chosen], grid[chosen + 1]

    def target(
        self,
        denoiser: Denoiser,
        y0: torch.Tensor,
        eps: torch.Tensor,
        t: torch.Tensor,
        s: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        """Where the teacher's two steps from t over the middle to s lead, as one step of DDIM would get there."""
        diffusion = denoiser.diffusion
        u = diffusion.perturb(y0, t, eps)
        end = u
        for now, then in ((t, (t + s) / 2), ((t + s) / 2, s)):
            noise, clean = denoiser.predict(end, now, conditioning)
            end = diffusion.perturb(clean, then, noise)
        sigma_t, sigma_s = diffusion.sigma(t), diffusion.sigma(s)
        of_u = sigma_s / sigma_t
        of_x = diffusion.alpha(s) - of_u * diffusion.alpha(t)
        return _column(1.0 / of_x, u) * (end - _column(of_u, u) * u)

    def loss(self, diffusion: Diffusion, error: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """Squared, times max(SNR, 1) (their section 4)."""
        snr = torch.exp(2.0 * diffusion.log_snr(t))
        return snr.clamp(min=1.0).to(error.device, error.dtype) * error.square().flatten(1).mean(1)


def _column(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.to(like.device, like.dtype).view(-1, 1, 1, 1)
