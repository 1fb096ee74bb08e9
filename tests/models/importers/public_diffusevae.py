"""DiffuseVAE's networks written out plainly, with the layout of the public checkpoints, to compare imports with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class Bottleneck(nn.Module):
    def __init__(self, channels: int, side: int, pool: int) -> None:
        super().__init__()
        half, size = channels // 2, 3 if side > 2 else 1
        self.c1, self.c4 = nn.Conv2d(channels, half, 1), nn.Conv2d(half, channels, 1)
        self.c2 = nn.Conv2d(half, half, size, padding=size // 2)
        self.c3 = nn.Conv2d(half, half, size, padding=size // 2)
        self.pool = pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.c4(F.gelu(self.c3(F.gelu(self.c2(F.gelu(self.c1(F.gelu(x))))))))
        return F.avg_pool2d(x, self.pool)


class PublicVAE(nn.Module):
    """From block strings: "16x1,16d2,16t8" is a block, a block that halves, a change of channels."""

    def __init__(self, encoder: str, decoder: str, channels: dict[int, int]) -> None:
        super().__init__()
        top, latent = max(channels), channels[1]
        self.enc, self.dec = nn.Module(), nn.Module()
        self.enc.in_conv = nn.Conv2d(3, channels[top], 3, padding=1, bias=False)
        self.enc.block_mod = self.layers(encoder, channels)
        self.enc.mu = nn.Conv2d(latent, latent, 1, bias=False)
        self.enc.logvar = nn.Conv2d(latent, latent, 1, bias=False)
        self.dec.block_mod = self.layers(decoder, channels)
        self.dec.last_conv = nn.Conv2d(channels[top], 3, 3, padding=1)

    @staticmethod
    def layers(blocks: str, channels: dict[int, int]) -> nn.Sequential:
        made: list[nn.Module] = []
        for word in blocks.split(","):
            side, letter, number = next(word.partition(c) for c in "xdut" if c in word)
            width, n = channels[int(side)], int(number)
            if letter == "x":
                made += [Bottleneck(width, int(side), 1) for _ in range(n)]
            elif letter == "d":
                made.append(Bottleneck(width, int(side), n))
            elif letter == "u":
                made.append(nn.Upsample(scale_factor=n))
            else:
                made.append(nn.Conv2d(width, channels[n], 1, bias=False))
        return nn.Sequential(*made)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x in [0, 1] to mean and logvar (B, D, 1, 1)."""
        h = self.enc.block_mod(self.enc.in_conv(x))
        return self.enc.mu(h), self.enc.logvar(h)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """z (B, D, 1, 1) to images in [0, 1]."""
        return torch.sigmoid(self.dec.last_conv(self.dec.block_mod(z)))


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, embedding: int, scale_shift: bool) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, outputs * (1 + scale_shift)))
        last = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(32, outputs), nn.SiLU(), nn.Dropout(0.1), last)
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        h = self.in_layers(x)
        e = self.emb_layers(embedding)[..., None, None]
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + e)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


class Attention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        pixels = x.flatten(2)
        heads = []
        for one in self.qkv(self.norm(pixels)).chunk(self.heads, dim=1):  # each head has its own q, k, v in a row
            q, k, v = one.chunk(3, dim=1)
            weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(q.shape[1]), dim=2)
            heads.append(v @ weights.transpose(1, 2))
        return (pixels + self.proj_out(torch.cat(heads, dim=1))).view_as(x)


class Resize(nn.Module):
    def __init__(self, channels: int, down: bool) -> None:
        super().__init__()
        self.down = down
        name = "op" if down else "conv"
        setattr(self, name, nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=1))

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        return self.op(x) if self.down else self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class Stem(nn.Conv2d):
    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class PublicUNet(nn.Module):
    """`factors`: downsampling factors with attention; `z_dim` 0: no latent guidance; conditional: x_hat is joined."""

    def __init__(
        self,
        width: int,
        multipliers: list[int],
        blocks: int,
        factors: list[int],
        heads: int,
        z_dim: int = 0,
        conditional: bool = True,
    ) -> None:
        super().__init__()
        embedding, scale_shift = 4 * width, z_dim > 0
        self.width = width

        def embed(inputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(inputs, embedding), nn.SiLU(), nn.Linear(embedding, embedding))

        def group(inputs: int, outputs: int, factor: int) -> nn.ModuleList:
            layers: list[nn.Module] = [Residual(inputs, outputs, embedding, scale_shift)]
            return nn.ModuleList(layers + [Attention(outputs, heads)] * (factor in factors))

        self.time_embed = embed(width)
        self.proj = embed(z_dim) if z_dim else None
        self.input_blocks = nn.ModuleList([nn.ModuleList([Stem(6 if conditional else 3, width, 3, padding=1)])])
        channels, skips, factor = width, [width], 1
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                self.input_blocks.append(group(channels, multiplier * width, factor))
                channels = multiplier * width
                skips.append(channels)
            if level < len(multipliers) - 1:
                self.input_blocks.append(nn.ModuleList([Resize(channels, down=True)]))
                skips.append(channels)
                factor *= 2
        between = Residual(channels, channels, embedding, scale_shift)
        after = Residual(channels, channels, embedding, scale_shift)
        self.middle_block = nn.ModuleList([between, Attention(channels, heads), after])
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(multipliers))):
            for block in range(blocks + 1):
                layers = group(channels + skips.pop(), multipliers[level] * width, factor)
                channels = multipliers[level] * width
                if level and block == blocks:
                    layers.append(Resize(channels, down=False))
                    factor //= 2
                self.output_blocks.append(layers)
        self.out = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(
        self, x: torch.Tensor, steps: torch.Tensor, x_hat: torch.Tensor | None, z: torch.Tensor | None
    ) -> torch.Tensor:
        """x and x_hat (B, 3, H, W) in [-1, 1], steps (B,) in 0..999, z (B, D)."""
        half = self.width // 2
        angles = steps.float()[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        if self.proj is not None:
            embedding = embedding + self.proj(z)
        h = x if x_hat is None else torch.cat([x, x_hat], dim=1)
        skips = []
        for block in self.input_blocks:
            for layer in block:
                h = layer(h, embedding)
            skips.append(h)
        for layer in self.middle_block:
            h = layer(h, embedding)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            for layer in block:
                h = layer(h, embedding)
        return self.out(h)


def ddpm_state(
    online: PublicUNet, average: PublicUNet, vae: nn.Module | None, formulation: int = 1, steps: int = 1000
) -> dict[str, torch.Tensor]:
    """What the training code's wrapper saves: both networks with the process's tables beside them, and the VAE."""
    betas = torch.linspace(1e-4, 0.02, steps).double()
    tables = {
        "betas": betas,
        "sqrt_alpha_bar": (1 - betas).cumprod(0).sqrt(),
        "post_coeff_2": torch.zeros(steps).double(),
    }
    if formulation == 2:
        tables["post_coeff_3"] = 1 - tables["post_coeff_2"]
    state = {}
    for prefix, network in (("online_network", online), ("target_network", average)):
        state |= {f"{prefix}.{name}": table for name, table in tables.items()}
        state |= {f"{prefix}.decoder.{name}": value for name, value in network.state_dict().items()}
    if vae is not None:
        state |= {f"vae.{name}": value for name, value in vae.state_dict().items()}
    return state
