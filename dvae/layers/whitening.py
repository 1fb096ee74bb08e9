"""Principal components of latents: counted in one pass, and coordinates on them that stay bounded."""

from __future__ import annotations

import torch
from torch import nn

FLOOR = 1e-4
"""Least variance of a component, as a part of the greatest: fewer images than numbers leave some without any."""
CLIP = 4.0
"""Standard deviations at which coordinates are cut."""


class RunningCovariance:
    """Mean and covariance of rows (n, D) that come in parts, in float64 (Chan, Golub & LeVeque 1983, equation 2.1)."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.scatter = torch.zeros(size, size, dtype=torch.float64)

    def add(self, rows: torch.Tensor) -> None:
        rows = rows.detach().cpu().flatten(1).double()
        mean, count = rows.mean(0), self.count + len(rows)
        apart = mean - self.mean
        centered = rows - mean
        self.scatter += centered.T @ centered + torch.outer(apart, apart) * (self.count * len(rows) / count)
        self.mean = self.mean + apart * (len(rows) / count)
        self.count = count

    @property
    def covariance(self) -> torch.Tensor:
        """(D, D), over count - 1."""
        return self.scatter / max(self.count - 1, 1)


class Whitening(nn.Module):
    """Coordinates (B, d) of latents (B, *latent) on their first d principal components, in standard deviations.

    What it knows are buffers, which no gradient reaches: nothing is differentiated through an eigendecomposition.
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
        """Take the components of greatest variance; of each the largest entry is positive."""
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
        """z with coordinate `number` (from 0) at value (B,), in standard deviations, and the others as they are."""
        away = (z.flatten(1) - self.mean) @ self.basis[number]
        step = value * self.deviation[number] - away
        return z + (step[:, None] * self.basis[number]).view_as(z)
