"""Read and write weights files (safetensors).

Files are written atomically. The header is checked before memory is allocated. Loading a file executes no code.
"""

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
"""Tensors by name, as in torch.nn.Module.state_dict."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def save_weights(path: Path, state: StateDict) -> None:
    """Write a state dict to a safetensors file atomically. Raises MachineError if it cannot be written."""
    tensors = {name: value.detach().contiguous().cpu() for name, value in state.items()}
    try:
        atomic_files.write_file(path, lambda aside: save_file(tensors, aside))
    except SafetensorError as error:
        raise MachineError(f"{path} could not be written ({fold(error)}): make room, then run it again") from None


def load_weights(path: Path) -> StateDict:
    """Load the tensors of a weights file to the CPU. Raises UserError if the file is missing or damaged."""
    try:
        read_weights_header(path)
        return load_file(path)
    except DamagedFile as error:
        raise UserError(f"{error}: not a readable weights file") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: not a readable weights file ({fold(error)})") from None


def refuse_nonfinite(state: StateDict, what: str) -> None:
    """Raise UserError if a tensor holds NaN or infinity. The message names the first such tensor."""
    for name, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{what}: {name!r} holds NaN or infinity: such weights are useless, take an earlier save")


def without_numbers(header: Mapping[str, StoredTensor]) -> StateDict:
    """Return tensors on the meta device with the shapes and dtypes of a header."""
    return {name: torch.empty(one.shape, dtype=DTYPES[one.dtype], device="meta") for name, one in header.items()}


def check_weights(module: torch.nn.Module, state: Mapping[str, torch.Tensor], what: str) -> None:
    """Raise UserError if the names, shapes or dtypes of `state` do not fit `module`.

    The message names the first tensor that does not fit. A floating-point dtype fits any other floating-point dtype.
    The values are not read.
    """
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
    """Load `state` into `module`. Raises UserError if they do not fit (see `check_weights`)."""
    check_weights(module, state, what)
    module.load_state_dict(state)


def part_of(state: Mapping[str, torch.Tensor], part: str) -> StateDict:
    """Return the tensors whose names start with "PART.", with that prefix removed."""
    return {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}
