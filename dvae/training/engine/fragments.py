"""Checkpoint files of an engine's state, independent of the number of ranks and the ZeRO stage.

Weights, moments and averages of a parameter are partitioned in the same way. At ZeRO 1 to 3 each rank holds a slice of
the flattened values. At ZeRO 0 every rank holds all values. Each file records which slices it holds. So m ranks at one
ZeRO stage can load a checkpoint that n ranks wrote at another stage: each rank reads the slices that it needs. Values
are only copied, so they do not change by rounding.
"""

from __future__ import annotations

import errno
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from dvae.errors import MachineError, fold
from dvae.utils.number_types import Count
from dvae.utils.read import DamagedFile, check, parse_json, read_weights_header, read_weights_metadata

WEIGHT, BUFFER, STEP = "weight", "buffer", "step"
"""Kinds of values besides the optimizer states (exp_avg, exp_avg_sq, ema, ...), and the key of the step counter."""


@dataclass(frozen=True)
class Fragment:
    """A slice of one parameter's flattened values, with the optimizer states of these values."""

    name: str
    """Name of the parameter in the module."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    """Index of the first value in the flattened parameter."""
    values: dict[str, torch.Tensor]
    """kind -> (numel,): views of the tensors that the engine works on."""
    step: int
    """Number of optimizer steps that were applied to these values."""


@dataclass(frozen=True)
class EnginePartition:
    """One rank's partition of an engine's state, copied to the host."""

    tensors: dict[str, torch.Tensor]
    """kind:name -> slice (numel,) of a parameter, or a whole buffer."""
    layout: dict[str, dict[str, Any]]
    """name of a parameter -> start, shape and step of its slice, as in `Fragment`."""

    def write(self, path: Path) -> None:
        """Write a safetensors file whose metadata holds the layout. Raises OSError if it cannot be written."""
        try:
            save_file(self.tensors, path, {"layout": json.dumps(self.layout)})
        except SafetensorError as error:  # it wraps errors of the disk, such as a full one
            raise OSError(errno.EIO, fold(error)) from error


def copy_partition(fragments: list[Fragment], buffers: Mapping[str, torch.Tensor]) -> EnginePartition:
    """Copy `fragments` and `buffers` to the host. Training may change the originals afterwards."""
    tensors = {f"{BUFFER}:{name}": copy_to_host(value) for name, value in buffers.items()}
    layout = {}
    for fragment in fragments:
        layout[fragment.name] = {"start": fragment.start, "shape": fragment.shape, STEP: fragment.step}
        tensors |= {f"{kind}:{fragment.name}": copy_to_host(value) for kind, value in fragment.values.items()}
    return EnginePartition(tensors, layout)


def copy_to_host(value: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to the CPU. It is a copy even if the tensor is there already."""
    return value.detach().to("cpu", copy=True).contiguous()


@dataclass
class LayoutEntry:
    """The layout of one parameter's slice, as a file records it; see `Fragment`."""

    start: Count
    """Index of the first value in the flattened parameter."""
    shape: list[Count]
    """Shape of the whole parameter."""
    step: Count
    """Number of optimizer steps."""


class SavedEngine:
    """The engine state that the files of all ranks in one folder hold together.

    Raises MachineError if a file cannot be read. The header of every file is checked against the file's size and
    layout before any tensor is read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.steps: dict[str, int] = {}
        self.kinds: dict[str, set[str]] = defaultdict(set)
        """name -> kinds of optimizer states that were saved for the parameter."""
        self._runs: dict[str, list[tuple[int, int, Any]]] = defaultdict(list)
        self._buffers: dict[str, Any] = {}
        try:
            for path in sorted(folder.glob("*.safetensors")):
                self._open(path)
        except (OSError, SafetensorError, DamagedFile) as error:
            raise MachineError(f"{folder}: not a readable checkpoint ({fold(error)})") from error
        if not self._runs:
            raise MachineError(f"{folder}: no engine state in this checkpoint")

    def _open(self, path: Path) -> None:
        header = read_weights_header(path)
        layout = check(dict[str, LayoutEntry], parse_json(read_weights_metadata(path).get("layout", ""), path), path)
        file = safe_open(path, framework="pt")
        for key, tensor in header.items():
            kind, _, name = key.partition(":")
            if kind == BUFFER:
                self._buffers[name] = file
                continue
            entry, shape = layout.get(name), tensor.shape
            # Files are not trusted: a slice that reaches beyond its parameter would be read into wrong places.
            if entry is None or len(shape) != 1 or entry.start + shape[0] > math.prod(entry.shape):
                raise DamagedFile(path, f"{key[:80]!r} does not fit the layout of the file")
            if self.shapes.setdefault(name, tuple(entry.shape)) != tuple(entry.shape):
                raise DamagedFile(path, f"{name[:80]!r} has another shape than in the files before")
            self.steps[name] = entry.step
            if kind != WEIGHT:
                self.kinds[name].add(kind)
            self._runs[key].append((entry.start, shape[0], file))

    def read(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        """Read values `start` to `start + numel` of a flattened parameter, (numel,), from all files that hold them.

        Raises MachineError if a value is missing, or is in more than one file.
        """
        key, end = f"{kind}:{name}", start + numel
        pieces = [
            (max(start, first), min(end, first + count), first, file)
            for first, count, file in self._runs.get(key, ())
            if max(start, first) < min(end, first + count)
        ]
        pieces.sort(key=lambda piece: piece[0])
        missing = numel - sum(high - low for low, high, _, _ in pieces)
        if missing > 0:
            raise MachineError(f"{self.folder}: {missing} of {numel} values of {key} are not in this checkpoint")
        if missing < 0 or any(before[1] > after[0] for before, after in pairwise(pieces)):
            raise MachineError(f"{self.folder}: values of {key} are in this checkpoint more than once")
        values = torch.empty(numel)
        for low, high, first, file in pieces:
            values[low - start : high - start] = file.get_slice(key)[low - first : high - first]
        return values

    def tensor(self, kind: str, name: str) -> torch.Tensor:
        """The values of one kind of a whole parameter, in its shape. Raises MachineError if they are missing."""
        if name not in self.shapes:
            raise MachineError(f"{self.folder}: no parameter {name!r} in this checkpoint: it belongs to another model")
        shape = self.shapes[name]
        return self.read(kind, name, 0, torch.Size(shape).numel()).view(shape)

    def buffers(self) -> dict[str, torch.Tensor]:
        """The saved buffers, by name."""
        return {name: file.get_tensor(f"{BUFFER}:{name}") for name, file in self._buffers.items()}

    def state_dict(self, kind: str) -> dict[str, torch.Tensor]:
        """A state dict of the module: the values of one kind ("weight", "ema", ...) as parameters, and the buffers."""
        return {name: self.tensor(kind, name) for name in self.shapes} | self.buffers()


def persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of a module that are part of its state dict."""
    names = module.state_dict().keys()
    return {name: value for name, value in module.named_buffers() if name in names}


OwnedSlice = tuple[str, nn.Parameter, torch.Tensor, int, int, int]
"""A slice of one parameter that a rank's optimizer updates: (name, parameter, flat, offset, start, count).

`flat` is the tensor that the optimizer works on. flat[offset : offset + count] are the values start to start + count of
the flattened parameter."""


def owned_slices(module: nn.Module, zero: Any, stage: int, rank: int) -> Iterator[OwnedSlice]:
    """Yield the slice of each parameter that the optimizer of rank `rank` updates.

    `zero` is DeepSpeed's optimizer, which wraps ours. Parameters of which the rank owns nothing are left out.
    """
    for name, parameter in module.named_parameters():
        if stage == 0:  # the optimizer works on the parameters themselves
            yield name, parameter, parameter, 0, 0, parameter.numel()
        elif stage < 3:
            # Stages 1 and 2 flatten all parameters of a group into one tensor and cut it into equal parts, one for each
            # rank. A cut may fall inside a parameter. "hp" is the optimizer's fp32 tensor, "lp" is the network's
            # parameter. The mapping is None if no value of the parameter is in this rank's part.
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
                in_flat, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield name, parameter, flat, in_flat.start, in_parameter.start, in_flat.numel
        else:
            # Stage 3 cuts each parameter by itself into equal parts, one for each rank. The last part is padded, and
            # the parts of a small parameter after its last value hold only padding.
            group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            start = rank * size
            count = min(size, parameter.ds_numel - start)  # type: ignore[attr-defined]
            if count > 0:
                yield name, parameter, zero.fp32_partitioned_groups_flat[group], offset, start, count
