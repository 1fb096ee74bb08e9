"""The sweep engine of W&B, which chooses the next trial and the trials to stop. Only this file imports `sweeps`.

The engine draws from the global generators of `random` and NumPy. They are seeded for each trial by its number. A grid
or random sweep therefore always proposes the same trials. A bayes sweep also depends on which trials have ended.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from dvae.errors import UserError, fold
from dvae.experiments.sweeps.trials import Trial, TrialState

METHODS = ("grid", "random", "bayes")
INSTALL = "pip install 'dvae[sweep]' && pip install --no-deps sweeps==0.3.0"


def library() -> ModuleType:
    """Import the package `sweeps`. Raises UserError if it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `sweeps` is written for an older pydantic, and pydantic warns about that
        try:
            import sweeps
        except ImportError as error:
            raise UserError(f"sweeps need W&B's engine ({fold(error)}): {INSTALL}") from None
    return sweeps


def violations(sweep: dict[str, Any]) -> list[str]:
    """Return the violations of W&B's schema in a sweep file, one line each."""
    try:
        found = library().schema_violations_from_proposed_config(sweep)
    except ValueError as error:
        found = [str(error)]
    return [fold(text) for text in found]


def propose(sweep: dict[str, Any], trials: Sequence[Trial]) -> dict[str, Any] | None:
    """Return the parameters of the next trial, given all earlier trials, or None if a grid is exhausted.

    Raises UserError if the method cannot use a parameter, such as a grid over a range of real numbers.
    """
    seed = int(np.random.SeedSequence(len(trials)).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # bayes handles a poor fit itself
            run = library().next_run(sweep, [_run(sweep, trial, []) for trial in trials])
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"method: {sweep['method']}: {fold(error)}") from None
    return None if run is None else {name: _plain(entry["value"]) for name, entry in run.config.items()}


def trials_to_stop(sweep: dict[str, Any], trials: Sequence[Trial], histories: dict[int, list[float]]) -> list[int]:
    """Return the numbers of the running trials that hyperband stops.

    `histories` maps each trial's number to all values of its metric so far.
    """
    if "early_terminate" not in sweep:
        return []
    runs = [_run(sweep, trial, histories.get(trial.number, [])) for trial in trials]
    return [int(run.name) for run in library().stop_runs(sweep, runs)]


ENGINE_STATES = {
    TrialState.running: "running",
    TrialState.finished: "finished",
    TrialState.stopped: "finished",
    TrialState.failed: "failed",
}
"""Trial states in terms of the engine. A stopped trial counts with the metric it had reached. The engine treats a
failed trial as the worst."""


def _run(sweep: dict[str, Any], trial: Trial, values: list[float]) -> Any:
    metric = (sweep.get("metric") or {}).get("name")
    return library().SweepRun(
        name=str(trial.number),
        state=ENGINE_STATES[trial.state],
        config={name: {"value": value} for name, value in trial.parameters.items()},
        summary_metrics={} if trial.metric is None else {metric: trial.metric},
        history=[{metric: value} for value in values],
    )


def _plain(value: Any) -> Any:
    """Convert a NumPy number to a Python number, which JSON and Hydra support."""
    return value.item() if isinstance(value, np.generic) else value
