"""The component for runs without an encoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.encoders.base import ENCODERS, Encoder, Posterior


@ENCODERS.register("none")
class NoEncoder(Encoder):
    """No encoder: there is no latent, and x_hat is 0. The refiner is then a plain diffusion model (Ho et al. 2020).

    Also set denoiser.condition_image=false, and leave encoder and prior out of stages=[...].
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        pass

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.latent_shape = (0,)
        self.shapes = shapes

    def encode(self, x: torch.Tensor) -> Posterior:
        """Return an empty posterior: mean and logvar have shape (B, 0)."""
        nothing = x.new_zeros(len(x), 0)
        return Posterior(nothing, nothing)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Return zeros (B, C, H, W)."""
        return z.new_zeros(len(z), self.shapes.channels, self.shapes.image_size, self.shapes.image_size)

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the squared error of x_hat = 0 as "loss" (B,). It is constant, because there are no parameters."""
        return {"loss": x.float().square().flatten(1).sum(1), "z": noise, "x_hat": torch.zeros_like(x)}
