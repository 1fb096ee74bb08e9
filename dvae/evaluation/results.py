"""Results of evaluations as files hold them: {"protocol": {...}, "sets": {name: figures}, "floor": {name: figures}}."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from dvae.errors import MachineError, fold
from dvae.evaluation.protocol import EvaluationProtocol
from dvae.utils.number_types import Count, Number
from dvae.utils.read import DamagedFile, check, parse_json, read_bytes

LIMIT = 2**26
"""Bytes of a file of results."""
COUNTS = ("n", "n_reference")
"""What figures hold besides metrics."""
keep_extra = with_config(ConfigDict(extra="allow"))


@keep_extra
class FigureRecord(TypedDict):
    """A metric over several seeds; the values of each seed lie beside these."""

    mean: Number
    se: Number | None


@keep_extra
class ResultRecord(TypedDict):
    """One result; a study adds more beside these."""

    protocol: dict[str, Any]
    sets: dict[str, dict[str, FigureRecord | Count]]
    floor: dict[str, dict[str, FigureRecord | Count]]


def check_result(value: Any, what: object) -> dict[str, Any]:
    """`value` (of JSON), of which everything that tables show has the right type.

    Raises DamagedFile for another value; UserError if its protocol is that of another version.
    """
    result: dict[str, Any] = dict(check(ResultRecord, value, what))
    if not math.isfinite(EvaluationProtocol.read(result["protocol"]).nfe):
        raise DamagedFile(what, "protocol: nfe is not finite")
    if not result["sets"]:
        raise DamagedFile(what, "holds no sets of images")
    for figures in [*result["sets"].values(), *result["floor"].values()]:
        for name, found in figures.items():
            if isinstance(found, dict) == (name in COUNTS):
                raise DamagedFile(what, f"{name[:80]!r} is no {'count' if name in COUNTS else 'figure'}")
        if "n" not in figures:
            raise DamagedFile(what, "figures say nothing of the number of images, n")
    return result


def read_result(path: Path) -> dict[str, Any]:
    """The result in a file; raises as `check_result`, or OSError if there is no file."""
    return check_result(parse_json(read_bytes(path, LIMIT), path), path)


def damaged_cache_file(path: Path, error: Exception) -> MachineError:
    """The error for a kept file that cannot be read: the same command computes it again without the file."""
    return MachineError(f"{path}: damaged ({fold(error).removeprefix(f'{path}: ')}); delete it, it will be made again")
