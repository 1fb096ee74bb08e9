"""Read and check files of results: {"protocol": {...}, "sets": {name: figures}, "floor": {name: figures}}."""

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
"""Largest accepted size of a results file, in bytes."""
COUNTS = ("n", "n_reference")
"""Keys of figures that are counts, and not metrics."""
keep_extra = with_config(ConfigDict(extra="allow"))


@keep_extra
class FigureRecord(TypedDict):
    """A metric over several seeds: mean and standard error. Other keys, such as per_seed, are allowed."""

    mean: Number
    se: Number | None


@keep_extra
class ResultRecord(TypedDict):
    """One result. Other keys are allowed."""

    protocol: dict[str, Any]
    sets: dict[str, dict[str, FigureRecord | Count]]
    floor: dict[str, dict[str, FigureRecord | Count]]


def check_result(value: Any, what: object) -> dict[str, Any]:
    """Check that a value from JSON is a result, with the right types for everything that tables show. Returns it.

    Raises DamagedFile if it is not. Raises UserError if the fields of its protocol belong to another version.
    """
    result: dict[str, Any] = dict(check(ResultRecord, value, what))
    if not math.isfinite(EvaluationProtocol.read(result["protocol"]).nfe):
        raise DamagedFile(what, "protocol: nfe is not finite")
    if not result["sets"]:
        raise DamagedFile(what, "holds no sets of images")
    for figures in [*result["sets"].values(), *result["floor"].values()]:
        for name, found in figures.items():
            if isinstance(found, dict) == (name in COUNTS):
                raise DamagedFile(what, f"{name[:80]!r} is not a {'count' if name in COUNTS else 'figure'}")
        if "n" not in figures:
            raise DamagedFile(what, "the number of images, n, is missing")
    return result


def read_result(path: Path) -> dict[str, Any]:
    """Read a result from a file. Raises as `check_result` does, or OSError if the file cannot be read."""
    return check_result(parse_json(read_bytes(path, LIMIT), path), path)


def damaged_cache_file(path: Path, error: Exception) -> MachineError:
    """The error for a damaged file in the cache. Without the file, the same command computes it again."""
    return MachineError(f"{path}: damaged ({fold(error).removeprefix(f'{path}: ')}); delete it, it will be made again")
