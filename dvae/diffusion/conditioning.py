"""What a batch of images is refined from, and the random numbers of a training batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dvae.diffusion.linalg import per_sample

NO_LABEL = -1
"""The label of a sample whose class is not given, or dropped."""


@dataclass(frozen=True)
class Conditioning:
    """What a batch of images is refined from."""

    x_hat: torch.Tensor
    """(B, C, H, W) in [-1, 1]."""
    z: torch.Tensor
    """(B, *latent)."""
    label: torch.Tensor | None = None
    """Class (B,), int64, -1 where it is not given; None: for no sample."""
    pca: torch.Tensor | None = None
    """(B,) bool: principal coordinates are given; None: of all samples."""

    @classmethod
    def unconditional(cls, x: torch.Tensor, label: torch.Tensor | None) -> Conditioning:
        """Of states like x (B, C, H, W) nothing is known but perhaps the class."""
        return cls(torch.zeros_like(x), x.new_zeros(len(x), 0), label)

    def __getitem__(self, chosen: slice | torch.Tensor) -> Conditioning:
        """Some of the samples."""
        label, pca = (None if part is None else part[chosen] for part in (self.label, self.pca))
        return Conditioning(self.x_hat[chosen], self.z[chosen], label, pca)

    def drop(self, keep: torch.Tensor) -> Conditioning:
        """x_hat, z, its coordinates and class dropped where keep (B,) is false."""
        dropped = self.drop_label(keep).drop_pca(keep)
        x_hat, z = self.x_hat * per_sample(keep, self.x_hat), self.z * per_sample(keep, self.z)
        return Conditioning(x_hat, z, dropped.label, dropped.pca)

    def drop_label(self, keep: torch.Tensor) -> Conditioning:
        """The class alone dropped where keep (B,) is false."""
        if self.label is None:
            return self
        label = self.label.masked_fill(~keep.to(self.label.device), NO_LABEL)
        return Conditioning(self.x_hat, self.z, label, self.pca)

    def drop_pca(self, keep: torch.Tensor) -> Conditioning:
        """The principal coordinates alone dropped where keep (B,) is false."""
        keep = keep.to(self.z.device)
        return Conditioning(self.x_hat, self.z, self.label, keep if self.pca is None else self.pca & keep)


@dataclass(frozen=True)
class NoiseSample:
    """The random numbers of one training batch, each keyed by its global sample number."""

    t: torch.Tensor
    """(B,) float64 in (0, 1]."""
    eps: torch.Tensor
    """(B, k*C, H, W), standard normal."""
    keep: torch.Tensor
    """(B,) bool: the conditions are kept."""
    keep_label: torch.Tensor | None = None
    """(B,) bool: the class is kept; None: wherever the conditions are."""
    keep_pca: torch.Tensor | None = None
    """(B,) bool: the principal coordinates are kept; None: wherever the conditions are."""
    weight: torch.Tensor | None = None
    """(B, p, p) float64: weight of the squared error of the p predicted components; None: 1."""
    aux_noise: torch.Tensor | None = None
    """(B, k*C, H, W), standard normal: draws the components of u_0 beside the image (denoising score matching)."""
