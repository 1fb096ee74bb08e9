"""Format the trials of a sweep as a table, best first."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dvae.experiments.sweeps.sweep_loop import count_done, format_value
from dvae.experiments.sweeps.sweep_spec import SweepSpec
from dvae.experiments.sweeps.trials import Trial
from dvae.utils import atomic_files
from dvae.utils.text_tables import aligned_lines


def ranked(trials: Sequence[Trial], spec: SweepSpec) -> list[Trial]:
    """Sort trials by metric, best first. Trials without a metric come last."""
    sign = 1 if spec.minimizes else -1
    return sorted(trials, key=lambda trial: (trial.metric is None, sign * (trial.metric or 0.0)))


def rows(trials: Sequence[Trial], spec: SweepSpec) -> list[list[Any]]:
    """Return the rows of the table: a header, and one row per trial."""
    parameters = list(spec.sweep["parameters"])
    heading = ["trial", "state", spec.metric, *parameters, "seconds", "message"]
    return [
        heading,
        *(
            [t.name, t.state.value, t.metric, *(t.parameters.get(name) for name in parameters), t.seconds, t.message]
            for t in ranked(trials, spec)
        ),
    ]


def write(trials: Sequence[Trial], spec: SweepSpec, path: Path) -> None:
    """Write the table as CSV, with numbers in full precision."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows(trials, spec))
    atomic_files.write_text(path, text.getvalue())


def text(trials: Sequence[Trial], spec: SweepSpec) -> str:
    """Return the table for a terminal, with four significant digits."""
    return "\n".join(
        aligned_lines([["" if cell is None else format_value(cell) for cell in row] for row in rows(trials, spec)])
    )


def closing_line(trials: Sequence[Trial], count: int, folder: Path) -> str:
    """Return a line with the number of finished trials and the paths of the table and the picture."""
    finished = count_done(trials)
    short = f", fewer than n={count}: the grid is exhausted" if finished < count else ""
    return f"{finished} of {len(trials)} trials finished{short}; {folder / 'trials.csv'} {folder / 'parallel.png'}"
