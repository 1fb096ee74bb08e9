"""Format versions of bundles and run folders: an older or newer one is refused in one line that says what reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dvae.errors import UserError
from dvae.utils import package

NEWEST = 10**6
"""A version beyond this was never written by any dvae."""


def refuse_format(what: str, place: Path, found: object, wanted: int, readers: Mapping[int, str]) -> None:
    """Raise UserError unless the format version `found` is the `wanted` one.

    `readers` maps older versions to the version of dvae that reads each.
    """
    known = type(found) is int  # not a bool
    if known and found == wanted:
        return
    if known and found in readers:
        advice = f"{readers[found]} reads it; this is dvae {package.VERSION}"  # type: ignore[index]
    elif known and wanted < found < NEWEST:  # type: ignore[operator]
        advice = f"a newer dvae wrote it, this is dvae {package.VERSION}: upgrade"
    else:
        advice = "no version of dvae wrote that"
    raise UserError(f"{place}: {what} format {str(found)[:40]}, this program reads {wanted}: {advice}")
