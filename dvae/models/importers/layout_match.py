"""The result of matching a checkpoint with a layout, and checks that the layouts share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dvae.errors import UserError
from dvae.models.importers.checkpoint_file import Checkpoint, CheckpointTensor
from dvae.models.importers.quoting import quoted

MAX_SHARED = 2
"""Largest ratio of the elements of all tensors to the numbers that are stored.

It is above 1 if tensors share storages.
"""
LARGEST_INDEX = 10**6
"""Bound on the index of a layer, larger than in any network."""
MAX_UNTRAINED = 1e-6
"""Largest absolute weight of a last convolution that was never trained.

Such a convolution is zero, or has 1e-10 of the usual variance in NCSN++.
"""


@dataclass(kw_only=True)
class LayoutMatch:
    """The parts of a bundle, and the settings of its config that the checkpoint determines."""

    needs: dict[str, str] = field(default_factory=dict)
    """Kind -> name of the component that the recipe must have."""
    components: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Kind -> component with its settings, which replaces the component of the recipe."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Dotted field -> value, which is read from the tensors or is the same in all checkpoints of the layout."""
    unknown: dict[str, str] = field(default_factory=dict)
    """Dotted field that is not stored in the file, so that the recipe sets it -> effect of a wrong value."""
    parts: dict[str, dict[str, CheckpointTensor]] = field(default_factory=dict)
    """Part of the bundle -> its tensors by name."""


def with_prefix(state: dict[str, CheckpointTensor], prefix: str) -> dict[str, CheckpointTensor]:
    """Return the tensors whose names start with `prefix`, by their names without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def network_tensors(
    checkpoint: Checkpoint, prefixes: dict[bool, str], ema: bool, others: tuple[str, ...]
) -> dict[str, CheckpointTensor]:
    """Return the tensors of the averaged or online network, by their names without the prefix.

    Args:
        checkpoint: The checkpoint.
        prefixes: Prefix of the averaged network (True) and of the online network (False).
        ema: Whether to return the averaged network.
        others: Prefixes of other tensors that the checkpoint may have.

    Raises UserError if the file has no such network, or has tensors with other prefixes.
    """
    state = checkpoint.state()
    known = (*prefixes.values(), *others)
    surplus = [name for name in state if not name.startswith(known)]
    found = with_prefix(state, prefixes[ema])
    if not found:
        held = sorted({name.partition(".")[0] for name in state})[:5]
        other = "; weights=online reads the online network" if ema and with_prefix(state, prefixes[False]) else ""
        raise UserError(f"{checkpoint.path}: has no {prefixes[ema]}*, but {', '.join(held)}{other}")
    if surplus:
        raise UserError(f"{checkpoint.path}: holds {quoted(surplus[0])}, which this layout has no place for")
    return found


def check_averaged(last: CheckpointTensor) -> None:
    """Raise UserError if averaged weights are still the initial weights.

    `last` is the weight of the last layer, which is (almost) zero before training.
    """
    if last.load().abs().max() < MAX_UNTRAINED:
        raise UserError(
            f"{last.checkpoint.path}: {quoted(last.name)} has the initial weights of an untrained network (probably no "
            "moving average was kept): use weights=online"
        )


def check_numbers(held: dict[str, CheckpointTensor]) -> None:
    """Raise UserError if storages are damaged, or if too many tensors share the same numbers.

    Without this check, a small file could describe a network of any size. It runs before memory is allocated.
    """
    storages = {(one.checkpoint.path, one.ref.storage) for one in held.values()}
    for one in held.values():
        one.checkpoint.check_storage(one.ref.storage)
    numbers = sum(storage.numel for _, storage in storages)
    if sum(max(one.ref.numel, one.ref.extent) for one in held.values()) > MAX_SHARED * numbers:
        first = next(iter(held.values()))
        raise UserError(f"{first.checkpoint.path}: many of its tensors have the same numbers: not a trained network")


def check_levels(checkpoint: Checkpoint, levels: int, image_size: int) -> None:
    """Raise UserError if images of `image_size` pixels cannot be halved for that many levels."""
    if levels > image_size.bit_length():
        raise UserError(
            f"{checkpoint.path}: its network has {levels} levels, more than images of {image_size} px can "
            "have: set the right image_size="
        )


def layer_index(text: str) -> int | None:
    """Return the index of a layer from a part of a tensor's name, or None if `text` is not a valid index."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < len(str(LARGEST_INDEX)) else None


def tensor_shape(
    checkpoint: Checkpoint, state: dict[str, CheckpointTensor], name: str, dimensions: int
) -> tuple[int, ...]:
    """Return the shape of the tensor `name`. Raises UserError if it is missing or has not `dimensions` dimensions."""
    if name not in state or len(state[name].shape) != dimensions:
        raise UserError(f"{checkpoint.path}: lacks {name!r} or has another shape for it: cut short or another layout")
    return state[name].shape
