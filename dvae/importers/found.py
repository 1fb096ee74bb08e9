"""What a layout finds in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dvae.errors import UserError
from dvae.importers.checkpoint import Checkpoint, Stored

NOTHING = 1e-6
"""Largest weight of a last convolution that was never trained: zero, or NCSN++'s 1e-10 of the usual variance."""


@dataclass(kw_only=True)
class Found:
    """The parts of a bundle, and what of its config the checkpoint tells."""

    needs: dict[str, str] = field(default_factory=dict)
    """Kind -> component that the recipe must have."""
    components: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Kind -> component and settings that take the place of the recipe's."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Dotted field -> value: read off the tensors, or the same in all checkpoints of the layout."""
    unknown: dict[str, str] = field(default_factory=dict)
    """Dotted field that is nowhere in the file and so is the recipe's -> what a wrong one does."""
    parts: dict[str, dict[str, Stored]] = field(default_factory=dict)
    """Part of the bundle -> its tensors."""


def under(state: dict[str, Stored], prefix: str) -> dict[str, Stored]:
    """The tensors below `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def network(checkpoint: Checkpoint, prefixes: dict[bool, str], ema: bool, others: tuple[str, ...]) -> dict[str, Stored]:
    """The tensors of the averaged (ema) or online network; `prefixes` names both, `others` what else may be there.

    Raises UserError on surplus tensors, and where the file has no such network.
    """
    state = checkpoint.state()
    known = (*prefixes.values(), *others)
    surplus = [name for name in state if not name.startswith(known)]
    found = under(state, prefixes[ema])
    if not found:
        held = sorted({name.partition(".")[0] for name in state})
        other = "; weights=online takes the others" if ema and under(state, prefixes[False]) else ""
        raise UserError(f"{checkpoint.path}: has no {prefixes[ema]}*, but {', '.join(held)}{other}")
    if surplus:
        raise UserError(f"{checkpoint.path}: holds {surplus[0]!r}, which this layout has no place for")
    return found


def check_averaged(last: Stored) -> None:
    """Refuse averaged weights that are still those of the first moment; `last` is the last layer's weight."""
    if last.load().abs().max() < NOTHING:
        raise UserError(
            f"{last.checkpoint.path}: {last.name!r} is that of an untrained network (no moving average was kept, it "
            "seems): use weights=online"
        )


def shape(checkpoint: Checkpoint, state: dict[str, Stored], name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of the tensor `name`. Raises UserError where there is none of so many dimensions."""
    if name not in state or len(state[name].shape) != dimensions:
        raise UserError(f"{checkpoint.path}: lacks {name!r}, or it has another form: cut short, or of another layout")
    return state[name].shape
