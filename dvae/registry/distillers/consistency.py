"""Consistency tuning."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dvae.diffusion.conditioning import Conditioning
from dvae.diffusion.denoiser import Denoiser
from dvae.diffusion.kernels import Diffusion
from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.distillers.base import DISTILLERS, Distiller


@DISTILLERS.register("consistency")
class ConsistencyTuning(Distiller):
    """Easy consistency tuning (Geng et al. 2024). Sample with sampler=consistency.

    The student learns to predict the same clean image at two neighboring noise levels with the same noise. The levels
    come nearer to each other during training. Let r = sigma/alpha be the noise level for data of unit variance. Then

        ln r_t ~ N(log_mean, log_std^2),     r_s = r_t (1 - n(r_t) / q^(1 + doublings so far)),
        n(r) = 1 + k sigmoid(-b r)

    If this r_s is below 0, it is set to 0, which is the clean image itself.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        log_mean: float = -0.4
        """Mean of ln(sigma/alpha). -0.4 is the paper's -1.1, which is for data of standard deviation 0.5."""
        log_std: float = 2.0
        """Standard deviation of ln(sigma/alpha), above 0."""
        q: float = 2.0
        """Factor by which the distance of the two noise levels decreases at each doubling, above 1."""
        doublings: int = 4
        """Number of equal parts of the training, at least 1. The distance of the two levels decreases by the factor q
        from each part to the next. Use 8 if training takes many more than a few thousand steps."""
        k: float = 8.0
        """Extra distance of the two levels at low noise: n(0) = 1 + k / 2."""
        b: float = 0.5
        """Rate at which the extra distance decreases as the noise level grows. 0.5 is the paper's 1, which is for data
        of standard deviation 0.5."""
        steps: int = 4
        """Number of sampling steps in the training previews, at least 1."""

    targets_from_student = True

    def __init__(self, config: Config, shapes: Shapes) -> None:
        if not config.q > 1.0:
            raise UserError(f"distiller.q={config.q}: use more than 1")
        for name in ("doublings", "steps"):
            if getattr(config, name) < 1:
                raise UserError(f"distiller.{name}={getattr(config, name)}: use 1 or more")
        if not config.log_std > 0.0:
            raise UserError(f"distiller.log_std={config.log_std}: use more than 0")
        self.config = config

    @property
    def rounds(self) -> tuple[int, ...]:
        return (self.config.steps,)

    def times(
        self, diffusion: Diffusion, steps: int, uniform: torch.Tensor, progress: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config, schedule = self.config, diffusion.schedule
        normal = torch.special.ndtri(uniform.clamp(2.0**-53, 1.0 - 2.0**-53))  # ndtri is infinite at 0 and 1
        last = schedule.integral(torch.ones(1, dtype=torch.float64))
        r = torch.minimum(torch.exp(config.log_mean + config.log_std * normal), torch.expm1(last).sqrt())
        gap = (1.0 + config.k * torch.sigmoid(-config.b * r)) / config.q ** (
            1.0 + (progress * config.doublings).floor()
        )
        lower = (r * (1.0 - gap)).clamp(min=0.0)
        return schedule.inverse(torch.log1p(r**2)), schedule.inverse(torch.log1p(lower**2))

    def target(
        self,
        denoiser: Denoiser,
        y0: torch.Tensor,
        eps: torch.Tensor,
        t: torch.Tensor,
        s: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        clean = (s <= 0.0).to(y0.device).view(-1, 1, 1, 1)
        # the prediction needs a time above 0, so use t if s is 0; torch.where then discards that prediction
        s = torch.where(s <= 0.0, t, s)
        return torch.where(clean, y0, denoiser.predict(denoiser.diffusion.perturb(y0, s, eps), s, conditioning)[1])

    def loss(self, diffusion: Diffusion, error: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """Return the Euclidean norm of the error, divided by r_t - r_s, (B,).

        This is the paper's adaptive weighting without an offset.
        """
        r_t, r_s = (torch.expm1(diffusion.schedule.integral(times)).sqrt() for times in (t, s))
        norm = (error.square().flatten(1).sum(1) + 1e-12).sqrt()  # 1e-12 makes it smooth at zero error
        return norm / (r_t - r_s).to(norm.device, norm.dtype)
