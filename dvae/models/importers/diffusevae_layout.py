"""Layout of the checkpoints of DiffuseVAE's public code (Pandey et al. 2022).

There are checkpoints of the VAE, and checkpoints of the DDPM, which usually contain the VAE too. Without their
prefixes, the tensors have the names of dvae's own `conv_vae` and `unet`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count, pairwise, repeat, zip_longest
from typing import Any

import torch

from dvae.errors import UserError
from dvae.layers.norms import default_groups
from dvae.models.importers.checkpoint_file import Checkpoint, CheckpointTensor
from dvae.models.importers.layout_match import (
    LayoutMatch,
    check_averaged,
    check_levels,
    layer_index,
    network_tensors,
    tensor_shape,
    with_prefix,
)
from dvae.models.importers.quoting import quoted

PREFIXES = {True: "target_network.decoder.", False: "online_network.decoder."}
OTHERS = ("online_network.", "target_network.", "vae.", "spaced_diffusion.")
"""Prefixes of the other tensors of such a checkpoint.

These are the VAE, and tables of the process, which are not imported because dvae computes them.
"""
GROUPS = 32
"""Groups of every GroupNorm in the public U-Net, for any width. No tensor shows this number."""
LONGEST_BLOCKS = 10_000
"""Most characters of a block string. The published strings have up to 200."""
MOST_STEPS = 100_000
"""Most steps of a table of betas. The published tables have 1000."""


def read(checkpoint: Checkpoint, vae: Checkpoint | None, ema: bool, config: dict[str, Any]) -> LayoutMatch:
    """Match a checkpoint of the DDPM with this layout.

    Args:
        checkpoint: Checkpoint of the DDPM.
        vae: Checkpoint of the VAE. If it is None, the VAE is read from `checkpoint`.
        ema: Whether to take the averaged weights instead of the online weights.
        config: Config of the recipe.

    Raises UserError if a file has another layout.
    """
    names = checkpoint.state()
    if not any(name.startswith(tuple(PREFIXES.values())) for name in names) and with_prefix(names, "enc."):
        raise UserError(
            f"{checkpoint.path}: holds the VAE alone: give the DDPM checkpoint, which contains the VAE, as ckpt=; this "
            "file is only needed to replace that VAE, as vae="
        )
    net = network_tensors(checkpoint, PREFIXES, ema, OTHERS)
    match = LayoutMatch(needs={"refiner": "unet", "process": "vp"}, parts={"denoiser": net})
    match.components["prior"] = {"name": "normal"}
    match.fields |= _unet(checkpoint, net, config["image_size"])
    if ema:
        check_averaged(net["out.2.weight"])
    match.components["schedule"] = _schedule(checkpoint, names)
    match.fields |= {"denoiser.prediction": "eps", "denoiser.mixed": False, "denoiser.data_scale": 1.0}
    match.fields |= {"denoiser.space": "pixel", "denoiser.pca_components": 0}
    # only formulation 2 of DiffuseVAE has a third coefficient in the posterior mean
    form2 = "online_network.post_coeff_3" in names
    match.fields["denoiser.center"] = "input" if form2 else "none"
    match.unknown = {
        "image_size": "wrong places for attention, worse images",
        "refiner.heads": "worse images; public configurations and scripts disagree on it",
        "denoiser.condition_dropout": "guidance refused, or without effect",
    }
    _read_vae(match, checkpoint, vae, config)
    return match


def _read_vae(match: LayoutMatch, checkpoint: Checkpoint, vae: Checkpoint | None, config: dict[str, Any]) -> None:
    """Add the VAE to `match`, or encoder=none if the U-Net is unconditional."""
    if not match.fields["denoiser.condition_image"]:
        if vae is not None:
            raise UserError(f"vae={vae.path}: the network of {checkpoint.path} is unconditional: leave vae= out")
        match.components["encoder"] = {"name": "none"}
        return
    match.needs["encoder"] = "conv_vae"
    source, state = (vae, vae.state()) if vae else (checkpoint, with_prefix(checkpoint.state(), "vae."))
    if "enc.mu.weight" not in state:
        raise UserError(f"{source.path}: holds no VAE (no tensor enc.mu.weight): give its own checkpoint as vae=FILE")
    match.parts["encoder"] = state
    match.fields |= _vae(source, state)
    check_levels(source, len(match.fields["encoder.channels"]), config["image_size"])
    sides = _resolutions(source, match.fields)
    if sides:
        match.fields["encoder.resolutions"] = sides
        if sides[0] != config["image_size"]:
            raise UserError(
                f"{source.path}: a VAE of {sides[0]} px, but the recipe has image_size={config['image_size']}"
            )
    else:
        match.unknown["encoder.resolutions"] = "worse reconstructions"


def _unet(checkpoint: Checkpoint, net: dict[str, CheckpointTensor], image_size: int) -> dict[str, Any]:
    """Return the settings of the U-Net and of its conditions, from the names and shapes of its tensors."""
    width, inputs, *_ = tensor_shape(checkpoint, net, "input_blocks.0.0.weight", 4)
    channels = tensor_shape(checkpoint, net, "out.2.weight", 4)[0]
    levels: list[list[tuple[int, bool]]] = [[]]
    """For each level, for each block: its channels, and whether attention follows it."""
    for n in count(1):
        block = f"input_blocks.{n}."
        if f"{block}0.op.weight" in net:
            levels.append([])
        elif f"{block}0.in_layers.2.weight" in net:
            outputs = tensor_shape(checkpoint, net, f"{block}0.in_layers.2.weight", 4)[0]
            levels[-1].append((outputs, f"{block}1.qkv.weight" in net))
        else:
            break
    check_levels(checkpoint, len(levels), image_size)
    kinds = [set(level) for level in levels]
    if any(len(kind) != 1 for kind in kinds) or len({len(level) for level in levels}) != 1:
        raise UserError(
            f"{checkpoint.path}: the blocks of its U-Net differ within a level: not a network of DiffuseVAE"
        )
    if inputs not in (channels, 2 * channels):
        raise UserError(
            f"{checkpoint.path}: its U-Net takes {inputs} channels for images of {channels}: unknown layout"
        )
    first = tensor_shape(checkpoint, net, "input_blocks.1.0.emb_layers.1.weight", 2)[0]
    return {
        "channels": channels,
        "refiner.width": width,
        "refiner.multipliers": [level[0][0] // width for level in levels],
        "refiner.blocks": len(levels[0]),
        "refiner.attention_resolutions": [image_size // 2**i for i, level in enumerate(levels) if level[0][1]],
        "refiner.scale_shift_norm": first == 2 * levels[0][0][0],
        "refiner.patch": 1,
        # From 64 channels on, 0 (the default) gives 32 groups too. It is preferred here, so that the settings of an
        # imported network equal the settings of the recipe.
        "refiner.groups": 0 if default_groups(width) == GROUPS else GROUPS,
        "denoiser.condition_image": inputs == 2 * channels,
        "denoiser.condition_latent": "proj.0.weight" in net,
    }


def _schedule(checkpoint: Checkpoint, names: dict[str, CheckpointTensor]) -> dict[str, Any]:
    """Return the schedule component for DDPM's table, from the buffer `betas`."""
    (steps,) = tensor_shape(checkpoint, names, "online_network.betas", 1)
    if steps > MOST_STEPS:
        raise UserError(
            f"{checkpoint.path}: its process has {steps} steps: no table of DDPM has more than {MOST_STEPS}"
        )
    betas = names["online_network.betas"].load().double()
    start, end = (float(f"{value:.6g}") for value in (betas[0], betas[-1]))  # the table is float32, so round
    if (betas - torch.linspace(start, end, len(betas), dtype=torch.float64)).abs().max() > 1e-5 * end:
        raise UserError(f"{checkpoint.path}: its betas are not evenly spaced, as DDPM's are")
    return {"name": "ddpm_linear", "beta_start": start, "beta_end": end, "steps": len(betas)}


def _vae(checkpoint: Checkpoint, state: dict[str, CheckpointTensor]) -> dict[str, Any]:
    """Return the settings of the VAE except `resolutions`, which the names and shapes of its tensors do not show."""
    encoder, decoder = _levels(checkpoint, state, "enc."), _levels(checkpoint, state, "dec.")
    return {
        "encoder.channels": [channels for channels, _ in encoder],
        "encoder.encoder_blocks": [blocks for _, blocks in encoder],
        "encoder.decoder_blocks": [blocks for _, blocks in reversed(decoder)],
        "encoder.latent_dim": tensor_shape(checkpoint, state, "enc.mu.weight", 4)[0],
        "encoder.patch": 1,
    }


def _levels(checkpoint: Checkpoint, state: dict[str, CheckpointTensor], half: str) -> list[tuple[int, int]]:
    """Return (channels, residual blocks) of each resolution of `half` ("enc." or "dec."), in the order of the file."""
    modules: dict[int, CheckpointTensor] = {}
    for name, value in state.items():
        match = re.fullmatch(re.escape(half) + r"block_mod\.(\d+)\.(c1\.)?weight", name)
        layer = layer_index(match[1]) if match else None
        if layer is not None:
            modules[layer] = value
    levels: list[list[int]] = []
    for _, weight in sorted(modules.items()):
        if len(weight.shape) != 4:
            raise UserError(f"{checkpoint.path}: {quoted(weight.name)} is no convolution: another layout")
        if ".c1." in weight.name:
            if not levels:
                levels.append([weight.shape[1], 0])
            levels[-1][1] += 1
        else:  # a convolution that changes the channels begins the next resolution
            levels = levels or [[weight.shape[1], 0]]
            levels.append([weight.shape[0], 0])
    if not levels:
        raise UserError(f"{checkpoint.path}: its VAE has no {half}block_mod.*: cut short, or of another layout")
    return [(channels, blocks) for channels, blocks in levels]


def _resolutions(checkpoint: Checkpoint, fields: dict[str, Any]) -> list[int]:
    """Return the heights of the VAE's levels, from the block strings in its hyper-parameters.

    Returns [] if the file has no block strings. Raises UserError if the strings describe an order of layers that
    `conv_vae` does not have.
    """
    settings = checkpoint.settings()
    encoder, decoder = settings.get("enc_block_str"), settings.get("dec_block_str")
    if not isinstance(encoder, str) or not isinstance(decoder, str):
        return []
    if max(len(encoder), len(decoder)) > LONGEST_BLOCKS:
        raise UserError(
            f"{checkpoint.path}: enc_block_str or dec_block_str in it has more than {LONGEST_BLOCKS} letters"
        )
    found = (layer_index(side) for side in re.findall(r"(?:^|,)(\d+)", encoder))
    sides = list(dict.fromkeys(side or 0 for side in found))
    down, up = fields["encoder.encoder_blocks"], fields["encoder.decoder_blocks"]
    if len(sides) == len(down) == len(up) and all(sides):
        steps = list(pairwise(sides))
        wanted_down = [f"{a}x{n - 1},{a}d{a // b},{a}t{b}" for (a, b), n in zip(steps, down, strict=False)]
        wanted_up = [f"{b}x{n},{b}u{a // b},{b}t{a}" for (a, b), n in zip(steps, up[1:], strict=True)]
        wanted_down.append(f"{sides[-1]}x{down[-1]}")
        wanted_up.insert(0, f"{sides[0]}x{up[0]}")
        if _same_layers(encoder, ",".join(wanted_down)) and _same_layers(decoder, ",".join(wanted_up[::-1])):
            return sides
    raise UserError(f"{checkpoint.path}: enc_block_str or dec_block_str in it orders layers as conv_vae cannot")


def _same_layers(blocks: str, wanted: str) -> bool:
    """Return whether two block strings describe the same layers. The comparison stops at the first difference."""
    return all(layer == other for layer, other in zip_longest(_layers(blocks), _layers(wanted)))


def _layers(blocks: str) -> Iterator[str]:
    """Yield the layers of a block string, one by one: "8x2,8d2" gives 8, 8, 8d2."""
    for entry in blocks.split(","):
        side, repeated, number = entry.partition("x")
        times = layer_index(number) if repeated else None
        yield from [entry] if times is None else repeat(side, times)
