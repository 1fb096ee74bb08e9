"""W&B's own engine: what to try next, and what to stop. The only file that imports `sweeps`.

Its functions draw from the global generators of `random` and NumPy. They are seeded for each trial by its number, so a
grid or a random sweep proposes the same trials whenever it is started; bayes depends on what has ended by then.
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
    """The package `sweeps`. Raises UserError where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is written for an older pydantic, which says so at length
        try:
            import sweeps
        except ImportError as error:
            raise UserError(f"sweeps need W&B's engine ({fold(error)}): {INSTALL}") from None
    return sweeps


def violations(sweep: dict[str, Any]) -> list[str]:
    """What W&B's schema has against a sweep file, one line each."""
    try:
        found = library().schema_violations_from_proposed_config(sweep)
    except ValueError as error:
        found = [str(error)]
    return [fold(text) for text in found]


def propose(sweep: dict[str, Any], trials: Sequence[Trial]) -> dict[str, Any] | None:
    """Parameters of the next trial, given all that came before it; None where a grid is exhausted.

    Raises UserError where the method cannot use a parameter (a grid over a range of real numbers).
    """
    seed = int(np.random.SeedSequence(len(trials)).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # bayes says in its own way that a fit is poor
            run = library().next_run(sweep, [_run(sweep, trial, []) for trial in trials])
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"method: {sweep['method']}: {fold(error)}") from None
    return None if run is None else {name: _plain(entry["value"]) for name, entry in run.config.items()}


def trials_to_stop(sweep: dict[str, Any], trials: Sequence[Trial], histories: dict[int, list[float]]) -> list[int]:
    """Numbers of the running trials that hyperband ends, by all values of the metric so far, one list per trial."""
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
"""A stopped trial counts with the metric that it had reached; a failed one as if it were the worst."""


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
    """NumPy's numbers as Python's, which JSON and Hydra know."""
    return value.item() if isinstance(value, np.generic) else value
