"""PSLD's score network written out plainly, with the layout of the public checkpoints, to compare imports with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

HALF = math.sqrt(0.5)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(channels // 4, 32), channels, eps=1e-6)


def resize(x: torch.Tensor, change: str, fir: bool) -> torch.Tensor:
    """Half ("down") or double ("up") the size, each pixel a mean or filtered by [1, 3, 3, 1]."""
    if not fir:
        return F.avg_pool2d(x, 2) if change == "down" else x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    kernel = torch.outer(taps, taps).repeat(x.shape[1], 1, 1, 1)
    if change == "down":
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), kernel, groups=x.shape[1])[:, :, ::2, ::2]
    spread = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    spread[:, :, ::2, ::2] = x
    return F.conv2d(F.pad(spread, (2, 1, 2, 1)), 4 * kernel, groups=x.shape[1])


class Frequencies(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.W = nn.Parameter(16 * torch.randn(width), requires_grad=False)


class NIN(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(torch.zeros(channels, channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bchw,cd->bdhw", x, self.W) + self.b[:, None, None]


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.GroupNorm_0 = norm(channels)
        self.NIN_0, self.NIN_1, self.NIN_2, self.NIN_3 = (NIN(channels) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.GroupNorm_0(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.NIN_0, self.NIN_1, self.NIN_2))
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(x.shape[1]), dim=2)
        return HALF * (x + self.NIN_3((v @ weights.transpose(1, 2)).view_as(x)))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, embedding: int, change: str = "", fir: bool = False) -> None:
        super().__init__()
        self.change, self.fir = change, fir
        self.GroupNorm_0, self.Conv_0 = norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.Dense_0 = nn.Linear(embedding, outputs)
        self.GroupNorm_1, self.Conv_1 = norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        if change or inputs != outputs:
            self.Conv_2 = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        h = F.silu(self.GroupNorm_0(x))
        if self.change:
            h, x = resize(h, self.change, self.fir), resize(x, self.change, self.fir)
        h = self.Conv_0(h) + self.Dense_0(F.silu(embedding))[..., None, None]
        h = self.Conv_1(F.silu(self.GroupNorm_1(h)))
        return HALF * (h + (self.Conv_2(x) if hasattr(self, "Conv_2") else x))


class Pyramid(nn.Module):
    def __init__(self, inputs: int, outputs: int, fir: bool) -> None:
        super().__init__()
        self.fir = fir
        setattr(self, "Conv2d_0" if fir else "Conv_0", nn.Conv2d(inputs, outputs, 3, stride=2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.fir:
            return self.Conv_0(F.pad(x, (0, 1, 0, 1)))
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        kernel = torch.outer(taps, taps).repeat(x.shape[1], 1, 1, 1)
        return self.Conv2d_0(F.conv2d(F.pad(x, (2, 2, 2, 2)), kernel, groups=x.shape[1]))


class PublicNCSNpp(nn.Module):
    """`all_modules` in the order in which the public code makes them; attention at heights `attended`."""

    def __init__(
        self,
        channels: int,
        outputs: int,
        width: int,
        multipliers: list[int],
        blocks: int,
        attended: list[int],
        side: int,
        fourier: bool = False,
        fir: bool = False,
        progressive: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.multipliers, self.blocks, self.attended = width, multipliers, blocks, attended
        self.fourier, self.progressive = fourier, progressive
        e = 4 * width
        made: list[nn.Module] = [Frequencies(width)] if fourier else []
        made += [nn.Linear(2 * width if fourier else width, e), nn.Linear(e, e)]
        made.append(nn.Conv2d(channels, width, 3, padding=1))
        now, pyramid, skips = width, channels, [width]
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                made.append(Block(now, multiplier * width, e))
                now = multiplier * width
                if side in attended:
                    made.append(Attention(now))
                skips.append(now)
            if level < len(multipliers) - 1:
                made.append(Block(now, now, e, "down", fir))
                if progressive:
                    made.append(Pyramid(pyramid, now, fir))
                    pyramid = now
                skips.append(now)
                side //= 2
        made += [Block(now, now, e), Attention(now), Block(now, now, e)]
        for level in reversed(range(len(multipliers))):
            for _ in range(blocks + 1):
                made.append(Block(now + skips.pop(), multipliers[level] * width, e))
                now = multipliers[level] * width
            if side in attended:
                made.append(Attention(now))
            if level:
                made.append(Block(now, now, e, "up", fir))
                side *= 2
        made += [norm(now), nn.Conv2d(now, outputs, 3, padding=1)]
        self.all_modules = nn.ModuleList(made)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x (B, channels, H, W), t (B,) in (0, 1]."""
        modules = iter(self.all_modules)
        if self.fourier:
            angles = 2 * math.pi * t.log()[:, None] * next(modules).W
        else:
            half = self.width // 2
            angles = t[:, None] * 10_000.0 ** (-torch.arange(half) / (half - 1))
        embedding = next(modules)(torch.cat([angles.sin(), angles.cos()], dim=1))
        embedding = next(modules)(F.silu(embedding))
        pyramid, skips = x, [next(modules)(x)]
        for level in range(len(self.multipliers)):
            for _ in range(self.blocks):
                h = next(modules)(skips[-1], embedding)
                skips.append(next(modules)(h) if h.shape[2] in self.attended else h)
            if level < len(self.multipliers) - 1:
                h = next(modules)(skips[-1], embedding)
                if self.progressive:
                    h = pyramid = HALF * (next(modules)(pyramid) + h)
                skips.append(h)
        h = next(modules)(skips[-1], embedding)
        h = next(modules)(h)
        h = next(modules)(h, embedding)
        for level in reversed(range(len(self.multipliers))):
            for _ in range(self.blocks + 1):
                h = next(modules)(torch.cat([h, skips.pop()], dim=1), embedding)
            if h.shape[2] in self.attended:
                h = next(modules)(h)
            if level:
                h = next(modules)(h, embedding)
        h = F.silu(next(modules)(h))
        return next(modules)(h)
