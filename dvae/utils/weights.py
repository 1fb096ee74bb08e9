"""Weights files (safetensors): written whole, checked before memory is taken, loaded without executing anything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dvae.errors import MachineError, UserError, fold
from dvae.utils import atomic_files
from dvae.utils.read import DamagedFile, StoredTensor, read_weights_header

StateDict = dict[str, torch.Tensor]
"""A state dict."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def save_weights(path: Path, state: StateDict) -> None:
    """Write a state dict as safetensors, complete or absent. Raises MachineError if the disk is full."""
    tensors = {name: value.detach().contiguous().cpu() for name, value in state.items()}
    try:
        atomic_files.write_file(path, lambda aside: save_file(tensors, aside))
    except SafetensorError as error:
        raise MachineError(f"{path} could not be written ({fold(error)}): make room, then run it again") from None


def load_weights(path: Path) -> StateDict:
    """The tensors of a weights file, on the CPU. Raises UserError if it is missing or damaged."""
    try:
        read_weights_header(path)
        return load_file(path)
    except DamagedFile as error:
        raise UserError(f"{error}: not a readable weights file") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: not a readable weights file ({fold(error)})") from None


def refuse_nonfinite(state: StateDict, what: str) -> None:
    """Raise UserError naming the first tensor that holds NaN or infinity."""
    for name, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{what}: {name!r} holds NaN or infinity: such weights draw nothing, take an earlier save")


def without_numbers(header: Mapping[str, StoredTensor]) -> StateDict:
    """Tensors of the shapes and types in a header, on the meta device."""
    return {name: torch.empty(one.shape, dtype=DTYPES[one.dtype], device="meta") for name, one in header.items()}


def check_weights(module: torch.nn.Module, state: Mapping[str, torch.Tensor], what: str) -> None:
    """Raise UserError naming the first tensor of `state` that does not fit `module`; numbers are not looked at."""
    own = module.state_dict()
    for name in sorted(own.keys() | state.keys()):
        if name not in state:
            raise UserError(
                f"{what}: the weights lack {name!r}, which the config asks for: they belong to another config"
            )
        if name not in own:
            raise UserError(f"{what}: the weights hold {name!r}, which the config has no place for")
        if own[name].shape != state[name].shape:
            raise UserError(
                f"{what}: {name!r} is {tuple(state[name].shape)} in the weights and {tuple(own[name].shape)} by the "
                "config: they belong to different runs"
            )
        kinds = {own[name].dtype, state[name].dtype}
        if len(kinds) > 1 and not all(kind.is_floating_point for kind in kinds):
            raise UserError(f"{what}: {name!r} is {state[name].dtype} in the weights, {own[name].dtype} by the config")


def fit_weights(module: torch.nn.Module, state: StateDict, what: str) -> None:
    """Load `state` into `module`. Raises UserError naming the first tensor that does not fit."""
    check_weights(module, state, what)
    module.load_state_dict(state)


def part_of(state: Mapping[str, torch.Tensor], part: str) -> StateDict:
    """The tensors of one part, by the rest of their names."""
    return {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}
