"""What a layout finds in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dvae.errors import UserError
from dvae.models.importers.checkpoint_file import Checkpoint, CheckpointTensor
from dvae.models.importers.quoting import quoted

MAX_SHARED = 2
"""How often, on average, a stored number may be part of a tensor."""
LARGEST_INDEX = 10**6
"""Number of a layer that no network has."""
MAX_UNTRAINED = 1e-6
"""Largest weight of a last convolution that was never trained: zero, or NCSN++'s 1e-10 of the usual variance."""


@dataclass(kw_only=True)
class LayoutMatch:
    """The parts of a bundle, and what of its config the checkpoint tells."""

    needs: dict[str, str] = field(default_factory=dict)
    """Kind -> component that the recipe must have."""
    components: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Kind -> component and settings that take the place of the recipe's."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Dotted field -> value: read off the tensors, or the same in all checkpoints of the layout."""
    unknown: dict[str, str] = field(default_factory=dict)
    """Dotted field that is nowhere in the file and so is the recipe's -> what a wrong one does."""
    parts: dict[str, dict[str, CheckpointTensor]] = field(default_factory=dict)
    """Part of the bundle -> its tensors."""


def with_prefix(state: dict[str, CheckpointTensor], prefix: str) -> dict[str, CheckpointTensor]:
    """The tensors below `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def network_tensors(
    checkpoint: Checkpoint, prefixes: dict[bool, str], ema: bool, others: tuple[str, ...]
) -> dict[str, CheckpointTensor]:
    """The tensors of the averaged (ema) or online network; `prefixes` names both, `others` what else may be there.

    Raises UserError on surplus tensors, and where the file has no such network.
    """
    state = checkpoint.state()
    known = (*prefixes.values(), *others)
    surplus = [name for name in state if not name.startswith(known)]
    found = with_prefix(state, prefixes[ema])
    if not found:
        held = sorted({name.partition(".")[0] for name in state})[:5]
        other = "; weights=online takes the others" if ema and with_prefix(state, prefixes[False]) else ""
        raise UserError(f"{checkpoint.path}: has no {prefixes[ema]}*, but {', '.join(held)}{other}")
    if surplus:
        raise UserError(f"{checkpoint.path}: holds {quoted(surplus[0])}, which this layout has no place for")
    return found


def check_averaged(last: CheckpointTensor) -> None:
    """Refuse averaged weights that are still those of the first moment; `last` is the last layer's weight."""
    if last.load().abs().max() < MAX_UNTRAINED:
        raise UserError(
            f"{last.checkpoint.path}: {quoted(last.name)} is that of an untrained network (no moving average was "
            "kept, it seems): use weights=online"
        )


def check_numbers(held: dict[str, CheckpointTensor]) -> None:
    """Refuse tensors whose numbers are damaged, or are the same numbers again and again, before memory is taken.

    A small file could else describe a network of any size.
    """
    storages = {(one.checkpoint.path, one.ref.storage) for one in held.values()}
    for one in held.values():
        one.checkpoint.check_storage(one.ref.storage)
    numbers = sum(storage.numel for _, storage in storages)
    if sum(max(one.ref.numel, one.ref.extent) for one in held.values()) > MAX_SHARED * numbers:
        first = next(iter(held.values()))
        raise UserError(f"{first.checkpoint.path}: many of its tensors have the same numbers: not a trained network")


def check_levels(checkpoint: Checkpoint, levels: int, image_size: int) -> None:
    """Raise UserError for more levels, each of half the resolution, than images of `image_size` pixels have."""
    if levels > image_size.bit_length():
        raise UserError(
            f"{checkpoint.path}: its network has {levels} levels, more than images of {image_size} px can "
            "have: set the right image_size="
        )


def layer_index(text: str) -> int | None:
    """The number of a layer in a tensor's name; None if it is no such number."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < len(str(LARGEST_INDEX)) else None


def tensor_shape(
    checkpoint: Checkpoint, state: dict[str, CheckpointTensor], name: str, dimensions: int
) -> tuple[int, ...]:
    """The shape of the tensor `name`. Raises UserError where there is none of so many dimensions."""
    if name not in state or len(state[name].shape) != dimensions:
        raise UserError(f"{checkpoint.path}: lacks {name!r}, or it has another form: cut short, or of another layout")
    return state[name].shape
