"""The conditions of a batch of images, and the random numbers of a training batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dvae.diffusion.linalg import per_sample

NO_LABEL = -1
"""Label of a sample whose class is unknown or dropped."""


@dataclass(frozen=True)
class Conditioning:
    """The conditions of a batch of images."""

    x_hat: torch.Tensor
    """Reconstructions or samples of the VAE, (B, C, H, W), in [-1, 1]. Zeros if dropped."""
    z: torch.Tensor
    """Latents, (B, *latent). Zeros if dropped."""
    label: torch.Tensor | None = None
    """Classes, (B,), int64; -1 if the class is unknown or dropped. None: unknown for all samples."""
    pca: torch.Tensor | None = None
    """Whether the principal coordinates of z are used, (B,) bool. None: used for all samples."""

    @classmethod
    def unconditional(cls, x: torch.Tensor, label: torch.Tensor | None) -> Conditioning:
        """Return conditions for states like x (B, C, H, W): zero x_hat, an empty z, and the class if it is given."""
        return cls(torch.zeros_like(x), x.new_zeros(len(x), 0), label)

    def __getitem__(self, chosen: slice | torch.Tensor) -> Conditioning:
        """Return the conditions of some of the samples."""
        label, pca = (None if part is None else part[chosen] for part in (self.label, self.pca))
        return Conditioning(self.x_hat[chosen], self.z[chosen], label, pca)

    def drop(self, keep: torch.Tensor) -> Conditioning:
        """Return a copy without x_hat, z, principal coordinates and class for samples whose keep (B,) is false."""
        dropped = self.drop_label(keep).drop_pca(keep)
        x_hat, z = self.x_hat * per_sample(keep, self.x_hat), self.z * per_sample(keep, self.z)
        return Conditioning(x_hat, z, dropped.label, dropped.pca)

    def drop_label(self, keep: torch.Tensor) -> Conditioning:
        """Return a copy without the class for samples whose keep (B,) is false."""
        if self.label is None:
            return self
        label = self.label.masked_fill(~keep.to(self.label.device), NO_LABEL)
        return Conditioning(self.x_hat, self.z, label, self.pca)

    def drop_pca(self, keep: torch.Tensor) -> Conditioning:
        """Return a copy without the principal coordinates for samples whose keep (B,) is false."""
        keep = keep.to(self.z.device)
        return Conditioning(self.x_hat, self.z, self.label, keep if self.pca is None else self.pca & keep)


@dataclass(frozen=True)
class NoiseSample:
    """The random numbers of one training batch. Each depends only on the seed and the global sample number."""

    t: torch.Tensor
    """Times, (B,), float64, in (0, 1]."""
    eps: torch.Tensor
    """Standard normal noise, (B, k*C, H, W)."""
    keep: torch.Tensor
    """Whether to keep the conditions, (B,) bool."""
    keep_label: torch.Tensor | None = None
    """Whether to keep the class, (B,) bool. None: keep it if the conditions are kept."""
    keep_pca: torch.Tensor | None = None
    """Whether to keep the principal coordinates, (B,) bool. None: keep them if the conditions are kept."""
    weight: torch.Tensor | None = None
    """Weight of the squared error of the p predicted components, (B, p, p), float64. None: 1."""
    aux_noise: torch.Tensor | None = None
    """Standard normal noise, (B, k*C, H, W). It draws the components of u_0 other than the image, for denoising score
    matching."""
