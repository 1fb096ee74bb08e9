"""Principal components of latents, computed in one pass, and bounded coordinates of latents along them."""

from __future__ import annotations

import torch
from torch import nn

FLOOR = 1e-4
"""Lower bound of the variance of a component, relative to the largest variance. If there are fewer images than latent
values, some components have zero variance, and coordinates are divided by the standard deviation."""
CLIP = 4.0
"""Coordinates are clamped to [-CLIP, CLIP] standard deviations."""


class RunningCovariance:
    """Mean and covariance of vectors of `size` values, updated batch by batch.

    Computed in float64 with the update of Chan, Golub & LeVeque (1983), equation 2.1.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.scatter = torch.zeros(size, size, dtype=torch.float64)

    def add(self, rows: torch.Tensor) -> None:
        """Add a batch of n vectors (n, ...). Each is flattened to `size` values."""
        rows = rows.detach().cpu().flatten(1).double()
        mean, count = rows.mean(0), self.count + len(rows)
        apart = mean - self.mean
        centered = rows - mean
        self.scatter += centered.T @ centered + torch.outer(apart, apart) * (self.count * len(rows) / count)
        self.mean = self.mean + apart * (len(rows) / count)
        self.count = count

    @property
    def covariance(self) -> torch.Tensor:
        """The covariance (size, size), with the divisor count - 1."""
        return self.scatter / max(self.count - 1, 1)


class Whitening(nn.Module):
    """Coordinates (B, d) of latents (B, *latent) along their first d principal components, in standard deviations.

    The mean, the components and the standard deviations are buffers, so no gradient flows through the
    eigendecomposition.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, components: int, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("basis", torch.eye(components, size))
        self.register_buffer("deviation", torch.ones(components))

    @torch.no_grad()
    def fit(self, moments: RunningCovariance) -> None:
        """Set the buffers to the components of largest variance.

        The sign of each component is chosen so that its entry of largest absolute value is positive.
        """
        variances, vectors = torch.linalg.eigh(moments.covariance)
        chosen = vectors.flip(1).T[: len(self.deviation)]
        signs = chosen.gather(1, chosen.abs().argmax(1, keepdim=True)).sign()
        variances = variances.flip(0)[: len(self.deviation)]
        self.mean.copy_(moments.mean)
        self.basis.copy_(chosen * signs)
        self.deviation.copy_(variances.clamp(min=FLOOR * float(variances[0])).sqrt())

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        with torch.autocast(z.device.type, enabled=False):
            away = (z.flatten(1).float() - self.mean) @ self.basis.T
            return (away / self.deviation).clamp(-CLIP, CLIP)

    def with_coordinate(self, z: torch.Tensor, number: int, value: torch.Tensor) -> torch.Tensor:
        """Return latents z with coordinate `number` (from 0) set to `value` (B,), and the other coordinates unchanged.

        `value` is in standard deviations.
        """
        away = (z.flatten(1) - self.mean) @ self.basis[number]
        step = value * self.deviation[number] - away
        return z + (step[:, None] * self.basis[number]).view_as(z)
