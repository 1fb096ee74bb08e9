"""W&B's engine as we ask it: known answers of grid, random, bayes and hyperband."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
from typing import Any

import pytest
from tests_support import ROOT

from dvae.errors import UserError
from dvae.experiments.sweeps import sweep_engine
from dvae.experiments.sweeps.trials import Trial, TrialState

METRIC = {"name": "refiner/loss", "goal": "minimize"}
CHOICES = {"b": {"values": [1, 2, 3]}, "a": {"values": ["x", "y"]}, "c": {"value": 5}}


def sweep(method: str, parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"method": method, "parameters": parameters, "metric": METRIC, **more}


def drawn(given: dict[str, Any], count: int) -> list[Trial]:
    trials: list[Trial] = []
    for number in range(1, count + 1):
        parameters = sweep_engine.propose(given, trials)
        assert parameters is not None
        trials.append(Trial(number, parameters, TrialState.finished, metric=float(number)))
    return trials


def test_the_engines_version_is_that_which_is_told_and_installed() -> None:
    """It is installed without its dependencies: it asks for numpy<2, and runs on the numpy that we have."""
    wanted = f"pip install --no-deps sweeps=={importlib.metadata.version('sweeps')}"
    assert sweep_engine.INSTALL.endswith(wanted)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert wanted in makefile.replace("--quiet ", "")


def test_a_grid_is_every_combination_once_and_then_nothing() -> None:
    trials = drawn(sweep("grid", CHOICES), 6)
    assert {(t.parameters["a"], t.parameters["b"]) for t in trials} == set(itertools.product("xy", (1, 2, 3)))
    assert {t.parameters["c"] for t in trials} == {5}
    assert sweep_engine.propose(sweep("grid", CHOICES), trials) is None


def test_a_failed_point_of_a_grid_is_not_drawn_again() -> None:
    trials = drawn(sweep("grid", CHOICES), 6)
    trials[2].state, trials[2].metric = TrialState.failed, None
    assert sweep_engine.propose(sweep("grid", CHOICES), trials) is None


def test_random_draws_depend_on_the_trials_number_alone_and_stay_in_range() -> None:
    given = sweep("random", {"lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}, "n": CHOICES["b"]})
    trials = drawn(given, 40)
    rates = [trial.parameters["lr"] for trial in trials]
    assert len(set(rates)) == 40
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert 12 <= sum(rate < 1e-3 for rate in rates) <= 28  # half of them, were there enough
    assert {trial.parameters["n"] for trial in trials} == {1, 2, 3}
    unfinished = [Trial(trial.number, {"lr": 1e-3, "n": 1}) for trial in trials[:17]]
    assert sweep_engine.propose(given, unfinished) == trials[17].parameters


@pytest.mark.parametrize("goal", ["minimize", "maximize"])
def test_bayes_finds_the_best_of_a_parabola(goal: str) -> None:
    given = sweep("bayes", {"x": {"min": 0.0, "max": 1.0}}) | {"metric": {"name": "refiner/loss", "goal": goal}}
    sign = 1 if goal == "minimize" else -1
    trials: list[Trial] = []
    for number in range(1, 16):
        parameters = sweep_engine.propose(given, trials)
        assert parameters is not None
        metric = sign * (parameters["x"] - 0.3) ** 2
        trials.append(Trial(number, parameters, TrialState.finished, metric))
    assert min(abs(trial.parameters["x"] - 0.3) for trial in trials) < 0.02
    assert sum(abs(trial.parameters["x"] - 0.3) < 0.1 for trial in trials) > 5  # chance would be 3


def test_bayes_keeps_away_from_what_runs_and_from_what_failed() -> None:
    given = sweep("bayes", {"x": {"min": 0.0, "max": 1.0}})
    trials = [
        Trial(n, {"x": x}, TrialState.finished, (x - 0.3) ** 2) for n, x in enumerate((0.0, 0.2, 0.5, 0.8), start=1)
    ]
    for state in (TrialState.running, TrialState.failed):
        first = sweep_engine.propose(given, trials)
        assert first is not None
        second = sweep_engine.propose(given, [*trials, Trial(5, first, state)])
        assert second is not None
        assert abs(second["x"] - first["x"]) > 0.01


def test_parameters_can_be_written_as_json() -> None:
    given = sweep(
        "random", {"a": {"distribution": "q_uniform", "min": 8, "max": 64, "q": 8}, "b": {"min": 1, "max": 9}}
    )
    (trial,) = drawn(given, 1)
    assert json.loads(json.dumps(trial.parameters)) == trial.parameters
    assert all(type(value) in (int, float) for value in trial.parameters.values())


def test_a_range_of_real_numbers_is_no_grid() -> None:
    with pytest.raises(UserError, match="method: grid: Parameter x is a disallowed type"):
        sweep_engine.propose(sweep("grid", {"x": {"min": 0.0, "max": 1.0}}), [])


HYPERBAND = {"early_terminate": {"type": "hyperband", "min_iter": 2, "eta": 2, "strict": True}}


def histories(*values: list[float]) -> dict[int, list[float]]:
    return dict(enumerate(values, start=1))


def test_hyperband_ends_the_worse_half_at_each_band() -> None:
    """Bands at 2 and 4 values; at each, what is above the upper median of all that came so far is ended."""
    given = sweep("random", CHOICES, **HYPERBAND)
    trials = [Trial(n, {}) for n in range(1, 5)]
    early = histories([9, 1.0], [9, 2.0], [9, 3.0], [9, 4.0])
    assert sweep_engine.trials_to_stop(given, trials, early) == [4]  # sorted([1, 2, 3, 4])[int(4 / 2)] = 3
    assert sweep_engine.trials_to_stop(given, trials, histories([9.0], [9.0], [9.0], [9.0])) == []
    later = histories([9, 1, 9, 8.0], [9, 2, 9, 5.0], [9, 3, 9, 6.0], [9, 2, 9])
    assert sweep_engine.trials_to_stop(given, trials, later) == [
        1
    ]  # sorted([5, 6, 8])[1] = 6; the fourth is judged at 2: 2 <= 3


def test_hyperband_learns_from_those_that_ended_and_ends_only_those_that_run() -> None:
    given = sweep("random", CHOICES, **HYPERBAND)
    ended = [
        Trial(1, {}, TrialState.finished, 1.0),
        Trial(2, {}, TrialState.stopped, 1.0),
        Trial(3, {}, TrialState.failed),
    ]
    values = histories([9, 1.0], [9, 5.0], [9, 5.0], [9, 6.0])
    assert sweep_engine.trials_to_stop(given, [*ended, Trial(4, {})], values) == [4]


def test_hyperband_stops_nothing_unless_it_is_asked_for() -> None:
    assert (
        sweep_engine.trials_to_stop(
            sweep("random", CHOICES), [Trial(1, {}), Trial(2, {})], histories([1.0] * 9, [2.0] * 9)
        )
        == []
    )


def test_hyperband_knows_when_more_is_better() -> None:
    given = sweep("random", CHOICES, **HYPERBAND) | {"metric": {"name": "refiner/loss", "goal": "maximize"}}
    trials = [Trial(n, {}) for n in range(1, 5)]
    assert sweep_engine.trials_to_stop(given, trials, histories([0, 1.0], [0, 2.0], [0, 3.0], [0, 4.0])) == [1]
