"""The table, and the picture of parallel coordinates."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dvae.experiments.sweeps import parallel_coordinates, trial_table
from dvae.experiments.sweeps.parallel_coordinates import axis_of
from dvae.experiments.sweeps.sweep_spec import SweepSpec
from dvae.experiments.sweeps.trials import Trial, TrialState

PARAMETERS = {"lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}, "kind": {"values": ["a", "b"]}}


def spec(goal: str = "minimize", **more: object) -> SweepSpec:
    return SweepSpec("made-up", {"metric": {"name": "refiner/loss", "goal": goal}, "parameters": PARAMETERS | more})


def trials() -> list[Trial]:
    return [
        Trial(1, {"lr": 1e-4, "kind": "a"}, TrialState.finished, 0.5, 10.0),
        Trial(2, {"lr": 1e-3, "kind": "b"}, TrialState.failed, None, 1.0, "exit status 1: no memory"),
        Trial(3, {"lr": 1e-2, "kind": "a"}, TrialState.stopped, 0.25, 4.0),
    ]


@pytest.mark.parametrize(("goal", "order"), [("minimize", [3, 1, 2]), ("maximize", [1, 3, 2])])
def test_best_first_and_failures_last(goal: str, order: list[int], tmp_path: Path) -> None:
    trial_table.write(trials(), spec(goal), tmp_path / "trials.csv")
    with (tmp_path / "trials.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == [f"trial-000{number}" for number in order]
    assert {row["trial"]: row["refiner/loss"] for row in rows}["trial-0002"] == ""
    assert [float(row["lr"]) for row in rows] == [10.0 ** (-5 + number) for number in order]
    assert len(trial_table.text(trials(), spec(goal)).splitlines()) == 4


def test_the_last_line_says_what_lacks() -> None:
    assert (
        trial_table.closing_line(trials(), 2, Path("out")) == "2 of 3 trials finished; out/trials.csv out/parallel.png"
    )
    assert "fewer than n=9: the grid is exhausted" in trial_table.closing_line(trials(), 9, Path("out"))


def test_axes_place_and_name_values() -> None:
    axis = axis_of("lr", [1e-4, 1e-3, 1e-2], logarithmic=True)
    assert [axis.place(value) for value in (1e-4, 1e-3, 1e-2)] == pytest.approx([0.0, 0.5, 1.0])
    assert [text for _, text in axis.ticks] == ["0.0001", "0.001", "0.01"]
    axis = axis_of("width", list(range(100)), logarithmic=False)
    assert [place for place, _ in axis.ticks] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    axis = axis_of("kind", ["a", "b", True, None], logarithmic=False)
    assert sorted(axis.place(value) for value in ("a", "b", True, None)) == [0.125, 0.375, 0.625, 0.875]
    assert axis_of("one", [3, 3], logarithmic=False).place(3) == 0.5
    assert axis_of("zero", [0, 1], logarithmic=True).place(0) == 0.0


def colors(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("goal", ["minimize", "maximize"])
def test_the_best_trial_stands_out(goal: str, tmp_path: Path) -> None:
    path = tmp_path / "parallel.png"
    parallel_coordinates.draw(trials(), spec(goal), path)
    drawn = colors(path)
    assert drawn.shape[1] > 3 * 150
    yellow = (drawn[..., 0] > 180) & (drawn[..., 1] > 200) & (drawn[..., 2] < 80)  # viridis' bright end
    assert yellow.sum() > 200
    right = np.nonzero(yellow.any(0))[0].max() - 20
    at_the_metric = np.nonzero(yellow[:, right])[0].mean() / len(drawn)
    assert (at_the_metric > 0.5) == (goal == "minimize")  # it runs down to the least value, or up to the greatest


def test_long_names_are_broken_where_they_have_parts() -> None:
    assert (
        parallel_coordinates.break_name("evaluate/sets/refined/KID-lite0/mean")
        == "evaluate/sets/refined/\nKID-lite0/mean"
    )
    assert parallel_coordinates.break_name("train_refiner.lr") == "train_refiner.lr"


def test_no_finished_trial_and_constants_can_be_drawn(tmp_path: Path) -> None:
    failed = [Trial(1, {"lr": 1e-4, "kind": "a", "c": 5}, TrialState.failed)]
    parallel_coordinates.draw(failed, spec(c={"value": 5}), tmp_path / "parallel.png")
    assert colors(tmp_path / "parallel.png").std() > 5
    assert list(tmp_path.iterdir()) == [tmp_path / "parallel.png"]
