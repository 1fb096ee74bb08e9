"""Check the class names of images. A class is a value of one image attribute, numbered from 0."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from dvae.errors import UserError, suggest

NAMED = 20
"""Maximum number of values listed in an error message."""


def check_label(values: Mapping[str, Iterable[str | int]], attribute: str, names: Sequence[str]) -> None:
    """Check that images have `attribute` and that `names` contains all of its values.

    `values` maps each attribute to the values it takes. Raises UserError if the attribute is unknown or one of its
    values is not among `names`.
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
