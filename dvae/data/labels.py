"""Classes of images: the values of one of their attributes, numbered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from dvae.errors import UserError, suggest

NAMED = 20
"""Values that a message names."""


def check_label(values: Mapping[str, Iterable[str | int]], attribute: str, names: Sequence[str]) -> None:
    """Raise UserError where images have no such attribute, or one of its values is not among the classes `names`.

    `values` are those that each attribute takes.
    """
    if attribute not in values:
        raise UserError(f"data.label={attribute}: the images have no such attribute: {suggest(attribute, values)}")
    found = [str(value) for value in values[attribute]]
    lacking = [value for value in found if value not in names]
    if lacking:
        shown = ",".join(found[:NAMED]) + (",..." if len(found) > NAMED else "")
        raise UserError(
            f"data.label={attribute}: {lacking[0]!r} is not one of the classes {', '.join(names)}: name every value, "
            f"classes=[{shown}]"
        )
