"""The downward half of the U-Net of Dhariwal & Nichol (2021), which their denoiser and their classifier share."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from dvae.errors import UserError
from dvae.layers.attention import AttentionBackend
from dvae.layers.blocks import AttentionBlock, Downsample, EmbeddedSequential, ResBlock
from dvae.layers.norms import GROUPS


class LevelsConfig(Protocol):
    """Fields that the Config of any network with levels of resolution has."""

    width: int
    multipliers: list[int]
    blocks: int
    dropout: float
    patch: int


class UNetConfig(LevelsConfig, Protocol):
    """Fields that the Config of a network with this trunk has; the embedding is 4 * width wide."""

    attention_resolutions: list[int]
    heads: int
    attention: AttentionBackend
    scale_shift_norm: bool
    groups: int


def res_block(config: UNetConfig, inputs: int, outputs: int) -> ResBlock:
    return ResBlock(inputs, outputs, 4 * config.width, config.dropout, config.scale_shift_norm, config.groups)


def attention_block(config: UNetConfig, channels: int) -> AttentionBlock:
    return AttentionBlock(channels, config.heads, config.attention, config.groups)


def build_down_blocks(config: UNetConfig, inputs: int, image_size: int) -> tuple[nn.ModuleList, list[int]]:
    """The blocks down to the coarsest level, and the channels that each puts out.

    The first takes maps (B, inputs * patch^2, image_size / patch, image_size / patch).
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
    """Attention between two residual blocks, at the coarsest level."""
    return EmbeddedSequential(
        res_block(config, channels, channels), attention_block(config, channels), res_block(config, channels, channels)
    )


def check_unet(kind: str, config: UNetConfig, image_size: int) -> None:
    """Raise UserError where the fields do not fit each other or the images; `kind` is the component's, for messages."""
    check_levels(kind, config, image_size, config.attention_resolutions)
    for multiplier in config.multipliers:
        if config.heads < 1 or (multiplier * config.width) % config.heads:
            raise UserError(
                f"{kind}.heads {config.heads} does not divide {multiplier * config.width} channels: use a power of 2"
            )
    if config.groups < 0 or (config.groups and config.width % config.groups):
        raise UserError(f"{kind}.groups {config.groups} does not divide {kind}.width {config.width}: use 0 or {GROUPS}")


def check_levels(kind: str, config: LevelsConfig, image_size: int, attention_resolutions: list[int]) -> None:
    """Raise UserError where the levels do not fit the images; `kind` is the component's, for messages."""
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
