"""An engine's state parameter by parameter, whoever holds which part of it: what checkpoints are made of.

Weights, moments and averages of a parameter are cut the same way: with ZeRO 1 to 3 each rank holds a run of the
flattened values, with ZeRO 0 every rank holds all. A file says which runs it holds, so that a checkpoint of n ranks and
one ZeRO stage is taken up by m ranks and another stage: each reads the runs that it needs. Values are copied, never
computed, so nothing is rounded.
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
"""Kinds of values beside those of the optimizer (exp_avg, exp_avg_sq, ema, ...), and the count of its steps."""


@dataclass(frozen=True)
class Fragment:
    """A run of one parameter's flattened values, with all that belongs to them."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    values: dict[str, torch.Tensor]
    """By kind, views (numel,) of what the engine works on."""
    step: int
    """Optimizer steps that these values have seen."""


@dataclass(frozen=True)
class EnginePartition:
    """One rank's partition of an engine's state, copied to the host."""

    tensors: dict[str, torch.Tensor]
    """kind:name -> (numel,), or a whole buffer."""
    layout: dict[str, dict[str, Any]]
    """name -> start, shape, step."""

    def write(self, path: Path) -> None:
        """Raises OSError where the disk does not take it."""
        try:
            save_file(self.tensors, path, {"layout": json.dumps(self.layout)})
        except SafetensorError as error:
            raise OSError(errno.EIO, fold(error)) from error


def copy_partition(fragments: list[Fragment], buffers: Mapping[str, torch.Tensor]) -> EnginePartition:
    """Copies of `fragments` and `buffers`, which training may go on to change."""
    tensors = {f"{BUFFER}:{name}": copy_to_host(value) for name, value in buffers.items()}
    layout = {}
    for fragment in fragments:
        layout[fragment.name] = {"start": fragment.start, "shape": fragment.shape, STEP: fragment.step}
        tensors |= {f"{kind}:{fragment.name}": copy_to_host(value) for kind, value in fragment.values.items()}
    return EnginePartition(tensors, layout)


def copy_to_host(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to("cpu", copy=True).contiguous()


@dataclass
class LayoutEntry:
    """What a file says of its run of one parameter."""

    start: Count
    shape: list[Count]
    """Of the whole parameter."""
    step: Count


class SavedEngine:
    """What the ranks' files in one folder hold together. Raises MachineError if a file is not readable.

    Every file's header is checked against its size and its layout before any number is read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.steps: dict[str, int] = {}
        self.kinds: dict[str, set[str]] = defaultdict(set)
        """What was saved of a parameter besides its weights."""
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
            if entry is None or len(shape) != 1 or entry.start + shape[0] > math.prod(entry.shape):
                raise DamagedFile(path, f"{key[:80]!r} does not fit the layout of the file")
            if self.shapes.setdefault(name, tuple(entry.shape)) != tuple(entry.shape):
                raise DamagedFile(path, f"{name[:80]!r} has another shape than in the files before")
            self.steps[name] = entry.step
            if kind != WEIGHT:
                self.kinds[name].add(kind)
            self._runs[key].append((entry.start, shape[0], file))

    def read(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        """Values `start` to `start + numel` of a flattened parameter, whichever files they lie in.

        Raises MachineError if some are missing, or lie in more than one file.
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
        """A parameter's values in its own shape."""
        if name not in self.shapes:
            raise MachineError(f"{self.folder}: no parameter {name!r} in this checkpoint: it belongs to another model")
        shape = self.shapes[name]
        return self.read(kind, name, 0, torch.Size(shape).numel()).view(shape)

    def buffers(self) -> dict[str, torch.Tensor]:
        return {name: file.get_tensor(f"{BUFFER}:{name}") for name, file in self._buffers.items()}

    def state_dict(self, kind: str) -> dict[str, torch.Tensor]:
        """A whole state dict with values of one kind ("weight", "ema", ...) as the parameters."""
        return {name: self.tensor(kind, name) for name in self.shapes} | self.buffers()


def persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that belong to a module's state dict."""
    names = module.state_dict().keys()
    return {name: value for name, value in module.named_buffers() if name in names}


OwnedSlice = tuple[str, nn.Parameter, torch.Tensor, int, int, int]
"""The values of one parameter that a rank's optimizer steps: (name, parameter, flat, offset, start, count).

The values are flat[offset : offset + count], and start : start + count in the flattened parameter."""


def owned_slices(module: nn.Module, zero: Any, stage: int, rank: int) -> Iterator[OwnedSlice]:
    """The slice of each parameter that this rank's optimizer owns. `zero` is DeepSpeed's optimizer around it."""
    for name, parameter in module.named_parameters():
        if stage == 0:
            yield name, parameter, parameter, 0, 0, parameter.numel()
        elif stage < 3:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
                in_flat, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield name, parameter, flat, in_flat.start, in_parameter.start, in_flat.numel
        else:
            group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            start = rank * size
            count = min(size, parameter.ds_numel - start)  # type: ignore[attr-defined] # the last run is padded
            if count > 0:
                yield name, parameter, zero.fp32_partitioned_groups_flat[group], offset, start, count
