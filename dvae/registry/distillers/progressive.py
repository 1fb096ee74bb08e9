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
    """Progressive distillation (Salimans & Ho 2022, algorithm 2).

    In each round, the student learns to do two DDIM steps of its teacher in one step. The student is then the teacher
    of the next round. Sample with sampler=ddim, uniform spacing, and the round's number of steps.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        start: int = 64
        """Number of sampling steps of the first teacher, above `end`."""
        end: int = 4
        """Number of sampling steps of the last student. It must be `start`, halved one or more times."""

    targets_from_student = False

    def __init__(self, config: Config, shapes: Shapes) -> None:
        rounds, steps = [], config.start
        while steps > max(config.end, 1) and steps % 2 == 0:
            steps //= 2
            rounds.append(steps)
        if not rounds or steps != config.end:
            raise UserError(
                f"distiller.start={config.start}, distiller.end={config.end}: end must be start halved one or more "
                "times, for example 64 and 4"
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
        """Return the clean state with which one DDIM step from t to s has the result of two steps of the teacher.

        The teacher's first step ends at the middle (t + s) / 2, and its second at s.
        """
        diffusion = denoiser.diffusion
        u = diffusion.perturb(y0, t, eps)
        end = u
        for now, then in ((t, (t + s) / 2), ((t + s) / 2, s)):
            noise, clean = denoiser.predict(end, now, conditioning)
            end = diffusion.perturb(clean, then, noise)
        # one DDIM step is u_s = of_u u_t + of_x x0; solve it for x0
        sigma_t, sigma_s = diffusion.sigma(t), diffusion.sigma(s)
        of_u = sigma_s / sigma_t
        of_x = diffusion.alpha(s) - of_u * diffusion.alpha(t)
        return _column(1.0 / of_x, u) * (end - _column(of_u, u) * u)

    def loss(self, diffusion: Diffusion, error: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """Return the mean squared error times max(SNR, 1), (B,) (section 4 of the paper)."""
        snr = torch.exp(2.0 * diffusion.log_snr(t))
        return snr.clamp(min=1.0).to(error.device, error.dtype) * error.square().flatten(1).mean(1)


def _column(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshape values (B,) to (B, 1, 1, 1), with the dtype and device of `like`."""
    return values.to(like.device, like.dtype).view(-1, 1, 1, 1)
