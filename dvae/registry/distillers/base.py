"""Distillers: how a refiner learns to draw in few steps what its teacher draws in many."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from dvae.diffusion.conditioning import Conditioning
from dvae.diffusion.denoiser import Denoiser
from dvae.diffusion.kernels import Diffusion
from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Registry, Shapes


class Distiller(ABC):
    """Trains a denoiser's clean state at (u_t, t), for t drawn by `times`, towards `target`. Needs k = 1."""

    Config: type[ComponentConfig]
    targets_from_student: bool
    """Whether targets are of the student as it is at that step; else of the teacher, which stays as it is."""

    @abstractmethod
    def __init__(self, config: ComponentConfig, shapes: Shapes) -> None: ...

    @property
    @abstractmethod
    def rounds(self) -> tuple[int, ...]:
        """Trainings one after the other, each from the averaged weights of the one before, which are its teacher; by
        the number of steps that the student of each is for."""

    @abstractmethod
    def times(
        self, diffusion: Diffusion, steps: int, uniform: torch.Tensor, progress: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(t, s), both (B,) float64, 1 >= t > s >= 0, for a student of `steps` steps.

        From uniform draws (B,) in [0, 1), and the part of the round's training that is done, (B,) in [0, 1).
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
        """The clean state (B, C, H, W) that the student is to see in u_t = alpha_t y0 + sigma_t eps."""

    @abstractmethod
    def loss(self, diffusion: Diffusion, error: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """(B,) of the error of the clean state (B, C, H, W)."""

    def check(self, denoiser: Denoiser) -> None:
        """Raise UserError where the denoiser cannot be distilled."""
        name = DISTILLERS.name_of(self)
        if denoiser.diffusion.k != 1:
            raise UserError(f"distiller={name} needs a process with k = 1, this has k = {denoiser.diffusion.k}: use vp")
        if denoiser.config.prediction.name == "eps":
            raise UserError(
                f"distiller={name}: denoiser.prediction=eps says little of the image where few steps begin: distil a "
                "teacher that predicts v or x0"
            )


DISTILLERS: Registry[Distiller] = Registry("distiller", __package__, Distiller, optional=True)
