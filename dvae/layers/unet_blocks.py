"""The downsampling half of the U-Net of Dhariwal & Nichol (2021). Their denoiser and their classifier both use it."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from dvae.errors import UserError
from dvae.layers.attention import AttentionBackend
from dvae.layers.blocks import AttentionBlock, Downsample, EmbeddedSequential, ResBlock
from dvae.layers.norms import GROUPS


class LevelsConfig(Protocol):
    """The fields that the Config of any network with several resolutions must have."""

    width: int
    """Base number of channels. It must be a multiple of 32."""
    multipliers: list[int]
    """For each resolution from the highest down, the number of channels divided by `width` (at least 1)."""
    blocks: int
    """Number of residual blocks at each resolution (at least 1)."""
    dropout: float
    """Dropout probability in [0, 1)."""
    patch: int
    """Side of the pixel patches that are folded into channels before the first layer (at least 1)."""


class UNetConfig(LevelsConfig, Protocol):
    """The fields that the Config of a network with these blocks must have. The embedding has 4 * width values."""

    attention_resolutions: list[int]
    """Heights of the feature maps, in pixels, at which attention is used."""
    heads: int
    """Number of attention heads. It must divide the channels of every resolution."""
    attention: AttentionBackend
    """The implementation of attention."""
    scale_shift_norm: bool
    """Whether the embedding scales and shifts the second normalization of a block. Otherwise it is added."""
    groups: int
    """Number of groups of GroupNorm (0: `norms.default_groups`). It must divide `width`."""


def res_block(config: UNetConfig, inputs: int, outputs: int) -> ResBlock:
    """Return a residual block with the settings of `config`."""
    return ResBlock(inputs, outputs, 4 * config.width, config.dropout, config.scale_shift_norm, config.groups)


def attention_block(config: UNetConfig, channels: int) -> AttentionBlock:
    """Return an attention block with the settings of `config`."""
    return AttentionBlock(channels, config.heads, config.attention, config.groups)


def build_down_blocks(config: UNetConfig, inputs: int, image_size: int) -> tuple[nn.ModuleList, list[int]]:
    """Build the blocks from the input to the lowest resolution.

    The input of the first block is (B, inputs * patch^2, image_size / patch, image_size / patch).

    Returns:
        The blocks, and the number of output channels of each.
    """
    width, side = config.width, image_size // config.patch
    stem = nn.Conv2d(inputs * config.patch**2, width, 3, padding=1)
    blocks = nn.ModuleList([EmbeddedSequential(stem)])
    outputs, channels = [width], width
    for level, multiplier in enumerate(config.multipliers):
        if level > 0:
            blocks.append(EmbeddedSequential(Downsample(channels)))
            outputs.append(channels)
            side //= 2
        for _ in range(config.blocks):
            layers: list[nn.Module] = [res_block(config, channels, multiplier * width)]
            channels = multiplier * width
            if side in config.attention_resolutions:
                layers.append(attention_block(config, channels))
            blocks.append(EmbeddedSequential(*layers))
            outputs.append(channels)
    return blocks, outputs


def build_middle_block(config: UNetConfig, channels: int) -> EmbeddedSequential:
    """Return a residual block, attention and a residual block, for the lowest resolution."""
    return EmbeddedSequential(
        res_block(config, channels, channels), attention_block(config, channels), res_block(config, channels, channels)
    )


def check_unet(kind: str, config: UNetConfig, image_size: int) -> None:
    """Raise UserError if the fields do not fit each other or the image size.

    `kind` is the name of the component in messages.
    """
    check_levels(kind, config, image_size, config.attention_resolutions)
    for multiplier in config.multipliers:
        if config.heads < 1 or (multiplier * config.width) % config.heads:
            raise UserError(
                f"{kind}.heads {config.heads} does not divide {multiplier * config.width} channels: use a power of 2"
            )
    if config.groups < 0 or (config.groups and config.width % config.groups):
        raise UserError(f"{kind}.groups {config.groups} does not divide {kind}.width {config.width}: use 0 or {GROUPS}")


def check_levels(kind: str, config: LevelsConfig, image_size: int, attention_resolutions: list[int]) -> None:
    """Raise UserError if the resolutions do not fit the image size, or a setting is out of range.

    `kind` is the name of the component in messages.
    """
    if config.width < 1 or config.width % GROUPS:
        raise UserError(f"{kind}.width {config.width} is not a multiple of {GROUPS} (the groups of GroupNorm)")
    if not config.multipliers or min(config.multipliers) < 1 or config.blocks < 1:
        raise UserError(
            f"{kind}.multipliers {config.multipliers} and {kind}.blocks {config.blocks}: give at least one level "
            "and one block, all positive"
        )
    factor = config.patch * 2 ** (len(config.multipliers) - 1) if config.patch > 0 else 0
    if factor == 0 or image_size % factor:
        raise UserError(
            f"images of {image_size} px do not halve {len(config.multipliers) - 1} times after {kind}.patch "
            f"{config.patch}: use fewer {kind}.multipliers or another patch"
        )
    sides = [image_size // config.patch // 2**level for level in range(len(config.multipliers))]
    foreign = sorted(set(attention_resolutions) - set(sides))
    if foreign:
        raise UserError(f"{kind}.attention_resolutions {foreign} do not occur: the feature maps are {sides} px high")
    if not 0 <= config.dropout < 1:
        raise UserError(f"{kind}.dropout {config.dropout} is not in [0, 1)")
