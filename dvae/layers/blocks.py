"""Blocks of the denoising U-Net of Dhariwal & Nichol (2021), with the parameter names of OpenAI's checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dvae.layers.attention import AttentionBackend, attention
from dvae.layers.norms import GroupNorm


class ResBlock(nn.Module):
    """Residual block: x (B, inputs, H, W) and embedding (B, embedding) to (B, outputs, H, W).

    The embedding is added after the first convolution. If `scale_shift` is true, it scales and shifts the second
    normalization instead. `groups` is the number of groups of GroupNorm (0: `norms.default_groups`).
    """

    def __init__(
        self, inputs: int, outputs: int, embedding: int, dropout: float, scale_shift: bool, groups: int = 0
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        # GroupNorm includes SiLU. Identity takes the place of SiLU, so that the convolution has the same index, and
        # thus the same parameter names, as in the public checkpoints.
        self.in_layers = nn.Sequential(
            GroupNorm(inputs, silu=True, groups=groups), nn.Identity(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, (2 if scale_shift else 1) * outputs))
        self.out_layers = nn.Sequential(
            GroupNorm(outputs, silu=True, groups=groups),
            nn.Identity(),
            nn.Dropout(dropout),
            zero_module(nn.Conv2d(outputs, outputs, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        h = self.in_layers(x)
        e = self.emb_layers(embedding)
        if self.scale_shift:
            h = self.out_layers[0](h, *e.chunk(2, dim=1))
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + e[:, :, None, None])
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of a feature map (B, C, H, W), with a residual connection.

    The output has the shape of the input. `groups` is the number of groups of GroupNorm (0: `norms.default_groups`).
    """

    def __init__(self, channels: int, heads: int, backend: AttentionBackend, groups: int = 0) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.norm = GroupNorm(channels, groups=groups)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        zero_module(self.proj_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        # In the public checkpoints, the 3C channels have the order (heads, qkv, D). F.linear on (B, L, C) computes the
        # same as the Conv1d and avoids a transposition.
        qkv = F.linear(pixels, self.qkv.weight.squeeze(2), self.qkv.bias).unflatten(2, (self.heads, 3, -1))
        q, k, v = qkv.unbind(3)
        h = attention(q, k, v, self.backend).flatten(2)
        h = F.linear(h, self.proj_out.weight.squeeze(2), self.proj_out.bias)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """3x3 convolution with stride 2: (B, C, H, W) to (B, C, H/2, W/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Nearest-neighbor upsampling, then a 3x3 convolution: (B, C, H, W) to (B, C, 2H, 2W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class EmbeddedSequential(nn.Sequential):
    """A Sequential that passes the embedding to its residual blocks. Its other layers receive only the feature map."""

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResBlock) else layer(x)
        return x


def fold_patches(x: torch.Tensor, patch: int) -> torch.Tensor:
    """Fold patches into channels: (B, C, H, W) to (B, C * patch^2, H / patch, W / patch), in channels_last."""
    return F.pixel_unshuffle(x, patch).contiguous(memory_format=torch.channels_last)


def with_skip(block: nn.Module, h: torch.Tensor, skip: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """Run `block` on a feature map h and a skip connection, concatenated along the channels."""
    return block(torch.cat([h, skip], dim=1), embedding)


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters of `module` to zero, so that its residual branch is zero at first. Returns the module."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
