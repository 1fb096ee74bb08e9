"""The figures of a run by the names that W&B's summary has: "refiner/loss", "evaluate/sets/refined/KID-lite0/mean"."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dvae.errors import MachineError
from dvae.tracking.metrics_log import MetricsLog
from dvae.tracking.summary import read_summary
from dvae.utils.read import DamagedFile

EVALUATE = "evaluate"
"""Prefix of what the evaluate stage found out; that of a row of metrics.jsonl is its stage."""


def evaluation_figures(evaluation: Mapping[str, Any]) -> dict[str, float | None]:
    """Every single number that summary.json holds under "evaluation", by its path; settings are none."""
    found = {name: value for name, value in evaluation.items() if name not in ("protocol", "sampler")}
    return dict(_leaves(EVALUATE, found))


def training_figures(run_folder: Path) -> dict[str, float | None]:
    """The last value of every number that metrics.jsonl holds; None if it was not finite."""
    last: dict[str, float | None] = {}
    for row in MetricsLog(run_folder / "metrics.jsonl").rows():
        last |= {
            f"{row['stage']}/{name}": value
            for name, value in row.items()
            if name != "time" and not isinstance(value, str)
        }
    return last


def run_figures(run_folder: Path) -> dict[str, float | None]:
    """All figures of a run, finished or not; None for what is not finite. Raises MachineError for damaged files."""
    path = run_folder / "summary.json"
    if not path.exists():
        return training_figures(run_folder)
    reason = ""
    try:
        found = read_summary(path).figures
    except DamagedFile as error:
        found, reason = None, f" ({error.reason})"
    if found is None:
        raise MachineError(f"{path}: holds no figures{reason}; delete it, then launch the run again")
    return training_figures(run_folder) | {name: finite(value) for name, value in found.items()}


def finite(value: float | None) -> float | None:
    """`value`, or None if it is not finite."""
    return value if value is not None and math.isfinite(value) else None


def metric_history(run_folder: Path, name: str) -> list[float]:
    """The finite values of "STAGE/NAME" in metrics.jsonl, in order of step; empty for what only evaluation tells."""
    stage, _, key = name.partition("/")
    rows = MetricsLog(run_folder / "metrics.jsonl").rows(stage)
    return [float(row[key]) for row in rows if isinstance(row.get(key), int | float)]


def _leaves(path: str, value: Any) -> Iterator[tuple[str, float | None]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(f"{path}/{name}", item)
    elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        yield path, value
