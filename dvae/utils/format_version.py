"""Check the format versions of bundles and run folders.

An older or a newer version is rejected. The one-line message says which version of dvae can read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dvae.errors import UserError
from dvae.utils import package

NEWEST = 10**6
"""Upper bound of format versions. A larger number does not come from a newer dvae."""


def refuse_format(what: str, place: Path, found: object, wanted: int, readers: Mapping[int, str]) -> None:
    """Raise UserError unless the format version `found` equals `wanted`.

    Args:
        what: The kind of the file, for the message.
        place: The path, for the message.
        found: The version in the file. It may be of any type.
        wanted: The version that this dvae reads.
        readers: Maps older format versions to the version of dvae that reads them.
    """
    known = type(found) is int  # isinstance would accept a bool too
    if known and found == wanted:
        return
    if known and found in readers:
        advice = f"{readers[found]} reads it; this is dvae {package.VERSION}"  # type: ignore[index]
    elif known and wanted < found < NEWEST:  # type: ignore[operator]
        advice = f"a newer dvae wrote it, this is dvae {package.VERSION}: upgrade"
    else:
        advice = "no version of dvae wrote that"
    raise UserError(f"{place}: {what} format {str(found)[:40]}, this program reads {wanted}: {advice}")
