"""Collect the metrics of a run under the names in W&B's summary.

Examples of names are "refiner/loss" and "evaluate/sets/refined/KID-lite0/mean".
"""

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
"""Prefix of the results of the evaluate stage. Metrics of metrics.jsonl have their stage as the prefix."""


def evaluation_figures(evaluation: Mapping[str, Any]) -> dict[str, float | None]:
    """Return every number in the "evaluation" entry of summary.json, by its path.

    The settings ("protocol" and "sampler") and numbers in lists are left out.
    """
    found = {name: value for name, value in evaluation.items() if name not in ("protocol", "sampler")}
    return dict(_leaves(EVALUATE, found))


def training_figures(run_folder: Path) -> dict[str, float | None]:
    """Return the last value of every metric in metrics.jsonl. None if that value was not finite."""
    last: dict[str, float | None] = {}
    for row in MetricsLog(run_folder / "metrics.jsonl").rows():
        last |= {
            f"{row['stage']}/{name}": value
            for name, value in row.items()
            if name != "time" and not isinstance(value, str)
        }
    return last


def run_figures(run_folder: Path) -> dict[str, float | None]:
    """Return all metrics of a run, whether it has finished or not. Values that are not finite are None.

    Raises MachineError if a file is damaged.
    """
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
    """Return `value`, or None if it is not finite."""
    return value if value is not None and math.isfinite(value) else None


def metric_history(run_folder: Path, name: str) -> list[float]:
    """Return the finite values of the metric "STAGE/NAME" in metrics.jsonl, in the order of the steps.

    The result is empty for a metric that only the evaluation computes.
    """
    stage, _, key = name.partition("/")
    rows = MetricsLog(run_folder / "metrics.jsonl").rows(stage)
    return [float(row[key]) for row in rows if isinstance(row.get(key), int | float)]


def _leaves(path: str, value: Any) -> Iterator[tuple[str, float | None]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(f"{path}/{name}", item)
    elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        yield path, value
