"""Layout of the checkpoints of PSLD's public code (Pandey & Mandt 2023): an NCSN++ score network and its average.

Without their prefixes, the tensors have the names of dvae's own `ncsnpp`: all_modules.N, in the order of construction.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from dvae.errors import UserError
from dvae.models.importers.checkpoint_file import Checkpoint, CheckpointTensor
from dvae.models.importers.layout_match import (
    LayoutMatch,
    check_averaged,
    check_levels,
    layer_index,
    network_tensors,
    with_prefix,
)
from dvae.models.importers.quoting import quoted
from dvae.registry.core import Shapes
from dvae.registry.processes.base import PROCESSES

PREFIXES = {True: "ema_score_fn.", False: "score_fn."}


@dataclass(frozen=True)
class NcsnppModule:
    """Kind and channels of one module in `all_modules`."""

    kind: str
    """One of linear, conv, norm, fourier, block, resample, attention, pyramid, fir pyramid.

    A resample module is a block that halves or doubles the resolution.
    """
    inputs: int
    outputs: int


def read(checkpoint: Checkpoint, vae: Checkpoint | None, ema: bool, config: dict[str, Any]) -> LayoutMatch:
    """Match a checkpoint of the score network with this layout.

    Args:
        checkpoint: Checkpoint of the score network.
        vae: Must be None, because PSLD has no VAE.
        ema: Whether to take the averaged weights instead of the online weights.
        config: Config of the recipe.

    Raises UserError if the file has another layout, or if its network does not fit the process of the recipe.
    """
    if vae is not None:
        raise UserError(f"vae={vae.path}: PSLD has no VAE: leave vae= out")
    if with_prefix(checkpoint.state(), "clf_fn."):
        raise UserError(f"{checkpoint.path}: holds a classifier: give the checkpoint of the score network")
    net = network_tensors(checkpoint, PREFIXES, ema, ())
    modules = _modules(checkpoint, net)
    match = LayoutMatch(needs={"refiner": "ncsnpp"}, parts={"denoiser": net})
    match.components = {"encoder": {"name": "none"}, "prior": {"name": "normal"}}
    match.fields = _settings(checkpoint, modules, config) | {
        "refiner.patch": 1,
        "denoiser.prediction": "eps",
        "denoiser.mixed": False,
        "denoiser.space": "pixel",
        "denoiser.pca_components": 0,
        "denoiser.data_scale": 1.0,
        "denoiser.center": "none",
        "denoiser.condition_image": False,
        "denoiser.condition_latent": False,
    }
    if ema:
        check_averaged(net[f"all_modules.{len(modules) - 1}.weight"])
    match.unknown = {
        "image_size": "wrong places for attention, worse images",
        "process": "bad images; its constants are in no tensor either",
        "schedule": "bad images; its constants are in no tensor either",
    }
    if _components(config) > 1:
        match.unknown |= {"denoiser.matching": "worse images", "denoiser.factor": "bad images"}
    if "refiner.fir" not in match.fields:
        match.unknown["refiner.fir"] = "worse images; only a network with progressive input shows it"
    return match


def _modules(checkpoint: Checkpoint, net: dict[str, CheckpointTensor]) -> list[NcsnppModule]:
    """Return the modules in `all_modules`, in order. Raises UserError if PSLD's NCSN++ has no such module."""
    shapes: dict[int, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, value in net.items():
        number, _, inner = name.removeprefix("all_modules.").partition(".")
        layer = layer_index(number)
        if not name.startswith("all_modules.") or layer is None:
            raise UserError(f"{checkpoint.path}: {quoted(value.name)} is no part of NCSN++: another layout")
        shapes[layer][inner] = value.shape
    modules = []
    for layer in range(len(shapes)):
        module = _module(shapes[layer]) if layer in shapes else None
        if module is None:
            tensors = ", ".join(sorted(shapes[layer])[:5]) or "nothing"
            raise UserError(
                f"{checkpoint.path}: all_modules.{layer} ({tensors}) is no module of NCSN++ with BigGAN blocks, as "
                "PSLD has it: cut short, or of another layout"
            )
        modules.append(module)
    return modules


def _module(shapes: dict[str, tuple[int, ...]]) -> NcsnppModule | None:
    """Return the module that has tensors with these names and shapes, or None if there is no such module."""
    match shapes:
        case {"GroupNorm_1.weight": _, "Conv_0.weight": (outputs, inputs, _, _)} if "NIN_0.W" not in shapes:
            resamples = "Conv_2.weight" in shapes and inputs == outputs
            return NcsnppModule("resample" if resamples else "block", inputs, outputs)
        case {"GroupNorm_0.weight": _, "NIN_0.W": (inputs, outputs)}:
            return NcsnppModule("attention", inputs, outputs)
        case {"Conv2d_0.weight": (outputs, inputs, _, _)}:
            return NcsnppModule("fir pyramid", inputs, outputs)
        case {"Conv_0.weight": (outputs, inputs, _, _), "Conv_0.bias": _} if len(shapes) == 2:
            return NcsnppModule("pyramid", inputs, outputs)
        case {"weight": (outputs, inputs, _, _)}:
            return NcsnppModule("conv", inputs, outputs)
        case {"weight": (outputs, inputs)}:
            return NcsnppModule("linear", inputs, outputs)
        case {"weight": (channels,)}:
            return NcsnppModule("norm", channels, channels)
        case {"W": (frequencies,)} if len(shapes) == 1:
            return NcsnppModule("fourier", 1, frequencies)
    return None


def _settings(checkpoint: Checkpoint, modules: list[NcsnppModule], config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the network. Raises UserError if the modules are not in the order of NCSN++."""
    strange = UserError(f"{checkpoint.path}: its modules are not in the order of PSLD's NCSN++: another layout")
    fourier = bool(modules) and modules[0].kind == "fourier"
    begin = 3 + fourier
    if [module.kind for module in modules[fourier:begin]] != ["linear", "linear", "conv"]:
        raise strange
    stem = modules[begin - 1]
    down, channels = [], stem.outputs
    for module in modules[begin:]:
        if module.kind in ("block", "resample"):
            if module.inputs != channels:  # a skip connection is concatenated: the decoder half begins
                break
            channels = module.outputs
        down.append(module)
    if [module.kind for module in down[-3:]] != ["block", "attention", "block"]:  # the middle, at the coarsest level
        raise strange
    levels: list[list[int]] = [[]]
    attended: list[int] = [0]
    pyramids = set()
    for module in down[:-3]:
        if module.kind == "block":
            levels[-1].append(module.outputs)
        elif module.kind == "resample":
            levels.append([])
            attended.append(0)
        elif module.kind == "attention":
            attended[-1] += 1
        else:
            pyramids.add(module.kind)
    blocks = len(levels[0])
    even = all(len(level) == blocks and len(set(level)) == 1 for level in levels)
    check_levels(checkpoint, len(levels), config["image_size"])
    if not even or not set(attended) <= {0, blocks} or not pyramids <= {"pyramid", "fir pyramid"}:
        raise strange
    _check_channels(checkpoint, stem.inputs, config)
    size = config["image_size"]
    settings: dict[str, Any] = {
        "refiner.width": stem.outputs,
        "refiner.multipliers": [level[0] // stem.outputs for level in levels],
        "refiner.blocks": blocks,
        "refiner.attention_resolutions": [size // 2**i for i, number in enumerate(attended) if number],
        "refiner.progressive_input": bool(pyramids),
        "refiner.time": "fourier" if fourier else "positional",
    }
    if pyramids:
        settings["refiner.fir"] = "fir pyramid" in pyramids
    if not fourier:
        settings["refiner.time_scale"] = 1.0  # the public code embeds t in [0, 1] without a factor
    return settings


def _components(config: dict[str, Any]) -> int:
    """Return the components per channel in the state of the recipe's process: 1, or 2 with a momentum."""
    shapes = Shapes(image_size=config["image_size"], channels=config["channels"])
    return PROCESSES.build(config["process"], shapes).k


def _check_channels(checkpoint: Checkpoint, inputs: int, config: dict[str, Any]) -> None:
    """Raise UserError if the recipe's process gives the network another number of input channels."""
    given = _components(config) * config["channels"]
    if inputs != given:
        raise UserError(
            f"{checkpoint.path}: its network takes {inputs} channels, process={config['process']['name']} on images of "
            f"{config['channels']} gives {given}: choose a recipe with another process (psld and cld have a "
            "momentum, vp has none)"
        )
