"""Blocks and the downsampling half of NCSN++ (Song et al. 2021), with the parameter names of the public checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from dvae.errors import UserError
from dvae.layers.activation_checkpointing import maybe_checkpoint
from dvae.layers.attention import AttentionBackend, attention
from dvae.layers.blocks import zero_module
from dvae.layers.fir import downsample, fir_downsample, fir_filter
from dvae.layers.norms import GROUPS, GroupNorm
from dvae.layers.unet_blocks import LevelsConfig, check_levels

RESCALE = 2**-0.5
"""Factor on the sum of a block and its skip connection. It keeps the variance constant."""
MIN_TIME = 1e-5
"""Times t are clamped to at least this value before the logarithm is taken."""


class TimeEmbedding(Enum):
    """How the network embeds the time t in [0, 1]."""

    positional = "positional"
    """Sines and cosines of t at fixed frequencies."""
    fourier = "fourier"
    """Sines and cosines of log t at random frequencies; separates small t."""


class NCSNConfig(LevelsConfig, Protocol):
    """The fields that the Config of an NCSN++ network must have. The time embedding has 4 * width values."""

    attention_resolutions: list[int]
    """Heights of the feature maps, in pixels, at which attention is used."""
    attention: AttentionBackend
    """The implementation of attention."""
    time: TimeEmbedding
    """The embedding of the time."""
    time_scale: float
    """Factor on t for the positional embedding (> 0)."""
    fourier_scale: float
    """Standard deviation of the random frequencies of the Fourier embedding (> 0)."""
    checkpoint_blocks: bool
    """Whether the activations of blocks are recomputed in the backward pass."""


def check_ncsnpp(kind: str, config: NCSNConfig, image_size: int) -> None:
    """Raise UserError if the fields do not fit each other or the image size.

    `kind` is the name of the component in messages.
    """
    check_levels(kind, config, image_size, config.attention_resolutions)
    if config.time_scale <= 0 or config.fourier_scale <= 0:
        raise UserError(f"{kind}.time_scale {config.time_scale} or fourier_scale {config.fourier_scale}: not above 0")


def group_norm(channels: int, silu: bool = False) -> GroupNorm:
    """Return GroupNorm with at least 4 channels per group and at most 32 groups."""
    return GroupNorm(channels, silu, groups=min(channels // 4, GROUPS), eps=1e-6)


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, padding: int = 1) -> nn.Conv2d:
    """Return a convolution with Xavier-uniform weights and zero bias."""
    layer = nn.Conv2d(inputs, outputs, size, stride=stride, padding=padding)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a linear layer with Xavier-uniform weights and zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def positional_embedding(t: torch.Tensor, width: int) -> torch.Tensor:
    """Return the embedding [sin(t f), cos(t f)] of t (B,), as (B, width), fp32.

    The width / 2 frequencies f fall geometrically from 1 to 1/10000, both included.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


class GaussianFourierFeatures(nn.Module):
    """Fourier features [sin, cos](2 pi W log t) of t (B,) in [0, 1], as (B, 2 * width), fp32.

    W ~ N(0, scale^2) is drawn once and not trained (Tancik et al. 2020). The features use log t, as in PSLD.
    """

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.W: torch.Tensor
        self.register_buffer("W", scale * torch.randn(width))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        angles = 2.0 * math.pi * torch.log(t.float().clamp(min=MIN_TIME))[:, None] * self.W
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


class PixelLinear(nn.Module):
    """A linear layer that is applied to every pixel: (B, L, inputs) to (B, L, outputs)."""

    def __init__(self, inputs: int, outputs: int, gain: float) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(inputs, outputs))
        self.b = nn.Parameter(torch.zeros(outputs))
        nn.init.xavier_uniform_(self.W, gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.W.t(), self.b)


class NCSNBlock(nn.Module):
    """The residual block of BigGAN: x (B, inputs, H, W) and embedding (B, embedding) to (B, outputs, H', W').

    `resample` changes the resolution, both in the block and in the skip connection.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        dropout: float,
        resample: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.GroupNorm_0 = group_norm(inputs, silu=True)
        self.Conv_0 = conv(inputs, outputs)
        self.Dense_0 = linear(embedding, outputs)
        self.GroupNorm_1 = group_norm(outputs, silu=True)
        self.Dropout_0 = nn.Dropout(dropout)
        self.Conv_1 = zero_module(conv(outputs, outputs))
        changes = inputs != outputs or resample is not None
        self.Conv_2 = conv(inputs, outputs, size=1, padding=0) if changes else None

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        h = self.GroupNorm_0(x)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.Conv_0(h) + self.Dense_0(F.silu(embedding))[:, :, None, None]
        h = self.Conv_1(self.Dropout_0(self.GroupNorm_1(h)))
        return RESCALE * (h + (x if self.Conv_2 is None else self.Conv_2(x)))


class NCSNAttention(nn.Module):
    """Self-attention with one head over the pixels of a feature map, with a skip connection.

    The output has the shape of the input, (B, C, H, W).
    """

    def __init__(self, channels: int, backend: AttentionBackend) -> None:
        super().__init__()
        self.backend = backend
        self.GroupNorm_0 = group_norm(channels)
        self.NIN_0, self.NIN_1, self.NIN_2 = (PixelLinear(channels, channels, gain=0.1**0.5) for _ in range(3))
        self.NIN_3 = zero_module(PixelLinear(channels, channels, gain=1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixels = self.GroupNorm_0(x).flatten(2).transpose(1, 2)
        q, k, v = (layer(pixels)[:, :, None] for layer in (self.NIN_0, self.NIN_1, self.NIN_2))
        h = self.NIN_3(attention(q, k, v, self.backend)[:, :, 0])
        return RESCALE * (x + h.transpose(1, 2).unflatten(2, x.shape[2:]))


class InputPyramid(nn.Module):
    """A 3x3 convolution that halves the resolution of the input: (B, inputs, H, W) to (B, outputs, H/2, W/2)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.Conv_0 = conv(inputs, outputs, stride=2, padding=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.Conv_0(F.pad(x, (0, 1, 0, 1)))


class FirInputPyramid(nn.Module):
    """The same as `InputPyramid`, with a low-pass filter before the convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.Conv2d_0 = conv(inputs, outputs, stride=2, padding=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.Conv2d_0(fir_filter(x, (1.0, 3.0, 3.0, 1.0), padding=2))


def time_layers(config: NCSNConfig) -> list[nn.Module]:
    """Return the layers of the time embedding, whose output has 4 * width values.

    The positional features have no parameters, so they are not among the layers.
    """
    width = config.width
    if config.time is TimeEmbedding.positional:
        return [linear(width, 4 * width), linear(4 * width, 4 * width)]
    fourier = GaussianFourierFeatures(width, config.fourier_scale)
    return [fourier, linear(2 * width, 4 * width), linear(4 * width, 4 * width)]


def embed_time(config: NCSNConfig, layers: list[nn.Module], t_feature: torch.Tensor) -> torch.Tensor:
    """Return the embedding (B, 4 * width) of t_feature (B,) in [0, 1000]. `layers` come from `time_layers`."""
    *fourier, first, second = layers
    t = t_feature / 1000.0
    if fourier:
        return second(F.silu(first(fourier[0](t))))
    return second(F.silu(first(positional_embedding(config.time_scale * t, config.width))))


def down_layers(
    config: NCSNConfig, inputs: int, image_size: int, fir: bool = False, progressive_input: bool = False
) -> tuple[list[nn.Module], list[int]]:
    """Build the layers from the input to the lowest resolution.

    Args:
        config: The architecture.
        inputs: Number of input channels.
        image_size: Height of the images in pixels.
        fir: Downsample through the low-pass filter (`fir_downsample`).
        progressive_input: Add the downsampled input to the feature map at each level.

    Returns:
        The layers in the order of the public checkpoints, and the channels of all skip connections.
    """
    width, side = config.width, image_size // config.patch
    layers: list[nn.Module] = [conv(inputs, width)]
    channels, pyramid, skips = width, inputs, [width]
    for level, multiplier in enumerate(config.multipliers):
        if level > 0:
            layers.append(res_block(config, channels, channels, fir_downsample if fir else downsample))
            side //= 2
            if progressive_input:
                layers.append((FirInputPyramid if fir else InputPyramid)(pyramid, channels))
                pyramid = channels
            skips.append(channels)
        for _ in range(config.blocks):
            layers.append(res_block(config, channels, multiplier * width))
            channels = multiplier * width
            if side in config.attention_resolutions:
                layers.append(NCSNAttention(channels, config.attention))
            skips.append(channels)
    return layers, skips


def middle_layers(config: NCSNConfig, channels: int) -> list[nn.Module]:
    """Return a residual block, attention and a residual block, for the lowest resolution."""
    attention_layer = NCSNAttention(channels, config.attention)
    return [res_block(config, channels, channels), attention_layer, res_block(config, channels, channels)]


def numbered(*parts: list[nn.Module]) -> tuple[nn.ModuleList, list[int]]:
    """Return all layers in one list, as the public checkpoints number them, and the number of layers of each part."""
    return nn.ModuleList([layer for part in parts for layer in part]), [len(part) for part in parts]


def split_parts(layers: nn.ModuleList, sizes: list[int]) -> Iterator[list[nn.Module]]:
    """Yield the parts that `numbered` joined. `sizes` are the numbers of layers of the parts."""
    remaining = iter(layers)
    return ([next(remaining) for _ in range(size)] for size in sizes)


def res_block(
    config: NCSNConfig,
    inputs: int,
    outputs: int,
    resample: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> NCSNBlock:
    """Return a residual block for the width of the embedding and the dropout of `config`."""
    return NCSNBlock(inputs, outputs, 4 * config.width, config.dropout, resample)


def run_down_layers(
    layers: Iterable[nn.Module], x: torch.Tensor, embedding: torch.Tensor, use_checkpoint: bool
) -> list[torch.Tensor]:
    """Run the layers of `down_layers` on the input x.

    If `use_checkpoint` is true, the activations of blocks are recomputed in the backward pass.

    Returns:
        The feature maps of all skip connections. The last one has the lowest resolution.
    """
    stem, *rest = layers
    skips = [stem(x)]
    for layer in rest:
        if isinstance(layer, NCSNBlock):
            skips.append(maybe_checkpoint(use_checkpoint, layer, skips[-1], embedding))
        elif isinstance(layer, NCSNAttention):
            skips[-1] = maybe_checkpoint(use_checkpoint, layer, skips[-1])
        else:  # an input pyramid: the sum is both the skip and the input of the next pyramid layer
            x = skips[-1] = RESCALE * (layer(x) + skips[-1])
    return skips


def run_layers(
    layers: Iterable[nn.Module], h: torch.Tensor, embedding: torch.Tensor, use_checkpoint: bool
) -> torch.Tensor:
    """Run residual blocks and attention layers on the feature map h, one after another."""
    for layer in layers:
        inputs = (h, embedding) if isinstance(layer, NCSNBlock) else (h,)
        h = maybe_checkpoint(use_checkpoint, layer, *inputs)
    return h
