"""Distillers: methods that train a refiner to sample in a few steps what its teacher samples in many."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from dvae.diffusion.conditioning import Conditioning
from dvae.diffusion.denoiser import Denoiser
from dvae.diffusion.kernels import Diffusion
from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Registry, Shapes


class Distiller(ABC):
    """A distillation method. It needs a process with k = 1.

    Training draws t by `times`. It fits the clean state that the student predicts at (u_t, t) to `target`.
    """

    Config: type[ComponentConfig]
    targets_from_student: bool
    """Whether targets come from the student with its current weights. Otherwise they come from the frozen teacher."""

    @abstractmethod
    def __init__(self, config: ComponentConfig, shapes: Shapes) -> None: ...

    @property
    @abstractmethod
    def rounds(self) -> tuple[int, ...]:
        """Number of sampling steps of the student of each round.

        The rounds are trained one after the other. The averaged weights (EMA) of a round initialize the next round, and
        are its teacher.
        """

    @abstractmethod
    def times(
        self, diffusion: Diffusion, steps: int, uniform: torch.Tensor, progress: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw (t, s), both (B,) float64, 1 >= t > s >= 0, for a student that samples in `steps` steps.

        Args:
            diffusion: The diffusion, with k = 1.
            steps: Number of sampling steps of the student.
            uniform: Uniform draws (B,) in [0, 1).
            progress: Fraction of the round's training that is done, (B,), in [0, 1).
        """

    @abstractmethod
    def target(
        self,
        denoiser: Denoiser,
        y0: torch.Tensor,
        eps: torch.Tensor,
        t: torch.Tensor,
        s: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        """Return the clean state (B, C, H, W) that the student must predict for u_t = alpha_t y0 + sigma_t eps."""

    @abstractmethod
    def loss(self, diffusion: Diffusion, error: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """Return the loss (B,) for the error of the predicted clean state, (B, C, H, W)."""

    def check(self, denoiser: Denoiser) -> None:
        """Raise UserError if the denoiser cannot be distilled."""
        name = DISTILLERS.name_of(self)
        if denoiser.diffusion.k != 1:
            raise UserError(f"distiller={name} needs a process with k = 1, this has k = {denoiser.diffusion.k}: use vp")
        if denoiser.config.prediction.name == "eps":
            raise UserError(
                f"distiller={name}: denoiser.prediction=eps determines the image poorly at the high noise levels at "
                "which sampling begins: distil a teacher that predicts v or x0"
            )


DISTILLERS: Registry[Distiller] = Registry("distiller", __package__, Distiller, optional=True)
