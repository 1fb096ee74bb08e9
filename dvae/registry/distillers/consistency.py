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
    """The same clean image is to be seen at two neighboring noise levels of one noise, ever nearer to each other (easy
    consistency tuning, Geng et al. 2024). Its sampler is sampler=consistency.

    With r = sigma/alpha, the noise level of data of unit variance: ln r_t ~ N(log_mean, log_std^2), and r_s is
    r_t (1 - n(r_t) / q^(1 + doublings so far)), n(r) = 1 + k sigmoid(-b r), or 0, the image itself, where that is less.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        log_mean: float = -0.4
        """Mean of ln(sigma/alpha): the paper's -1.1 for data of standard deviation 0.5."""
        log_std: float = 2.0
        """Standard deviation of ln(sigma/alpha)."""
        q: float = 2.0
        """How much nearer the levels are after each doubling."""
        doublings: int = 4
        """How often they come nearer, evenly over training; 8 for trainings of many more steps than a few thousand."""
        k: float = 8.0
        """n(0) = 1 + k / 2: how much wider the distance is where there is little noise."""
        b: float = 0.5
        """How fast that ends as noise grows: the paper's 1 for data of standard deviation 0.5."""
        steps: int = 4
        """Steps of the sampler in its previews."""

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
        normal = torch.special.ndtri(uniform.clamp(2.0**-53, 1.0 - 2.0**-53))
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
        # predicted at some time above 0 where nothing of it is used
        s = torch.where(s <= 0.0, t, s)
        return torch.where(clean, y0, denoiser.predict(denoiser.diffusion.perturb(y0, s, eps), s, conditioning)[1])

    def loss(self, diffusion: Diffusion, error: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """The error's Euclidean norm, over r_t - r_s (their adaptive weighting without an offset)."""
        r_t, r_s = (torch.expm1(diffusion.schedule.integral(times)).sqrt() for times in (t, s))
        norm = (error.square().flatten(1).sum(1) + 1e-12).sqrt()  # smooth where the error is zero
        return norm / (r_t - r_s).to(norm.device, norm.dtype)
