"""Files of a sweep that are read back, its own and the user's: what is damaged is one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_sweep_files import GOOD

from dvae.errors import MachineError, UserError
from dvae.experiments.sweeps import sweep_spec
from dvae.experiments.sweeps.trial_processes import RunningTrial
from dvae.experiments.sweeps.trials import SweepFolder, Trial, TrialState

ROW: dict[str, Any] = {
    "number": 1, "parameters": {"lr": 0.1}, "state": "finished", "metric": 0.5, "seconds": 3.0, "message": "",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    made = SweepFolder(tmp_path / "sweep")
    made.open(GOOD, ["seed=1"])
    return made


def trials_file(folder: SweepFolder) -> Path:
    return folder.path / "trials.json"


def test_trials_come_back_as_written(folder: SweepFolder) -> None:
    trials = [
        Trial(1, {"lr": 0.1, "name": "a", "on": True, "none": None, "list": [1]}, TrialState.stopped, 0.5, 3.0),
        Trial(2, {}, TrialState.failed, None, 0.1, "exit status 1: no"),
        Trial(3, {"lr": 2}),
    ]
    folder.keep(trials)
    assert folder.trials() == trials
    folder.open(GOOD, ["seed=1"])


def test_a_sweep_with_aliases_is_taken_up_again(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(GOOD) + "x: &x {a: 1}\ny: *x\n")
    found = sweep_spec.read_user_yaml(path, "yaml")
    for _ in range(2):
        SweepFolder(tmp_path / "sweep").open(found, [])


@pytest.mark.parametrize(
    "text",
    [
        "{", "null", "{}", "[3]", "[" * 100_000, json.dumps([ROW, ROW]), json.dumps([ROW | {"number": 2}]),
        json.dumps([ROW | {"number": "1"}]), json.dumps([ROW | {"state": "gone"}]), json.dumps([ROW | {"state": 3}]),
        json.dumps([ROW | {"parameters": [1]}]), json.dumps([ROW | {"metric": "0.5"}]),
        json.dumps([ROW | {"metric": float("nan")}]), json.dumps([ROW | {"seconds": -1}]),
        json.dumps([ROW | {"message": None}]), json.dumps([{"number": 1}]), '[{"number": 1, "number": 2}]',
    ],
)  # fmt: skip
def test_damaged_trials_are_one_line(folder: SweepFolder, text: str) -> None:
    trials_file(folder).write_text(text)
    with pytest.raises(MachineError) as error:
        folder.trials()
    assert str(error.value).startswith(f"{trials_file(folder)}: is damaged (")
    assert str(error.value).endswith("); the trials' run folders beside it are intact")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_one_line(folder: SweepFolder, make: Any) -> None:
    make(trials_file(folder))
    with pytest.raises(MachineError, match=r"trials\.json: is damaged \(is a \w+, not a file\)"):
        folder.trials()
    (folder.path / "sweep.yaml").unlink()
    make(folder.path / "sweep.yaml")
    with pytest.raises(MachineError, match=r"sweep\.yaml: is a \w+, not a file: this sweep's record is damaged"):
        folder.open(GOOD, [])


@pytest.mark.parametrize("text", ["", "- a", "a: [", "a: 1\na: 2", "a: !!python/object:os.system {}", "\xff"])
def test_a_damaged_record_is_one_line(folder: SweepFolder, text: str) -> None:
    (folder.path / "sweep.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(MachineError, match=r"sweep\.yaml: .*: this sweep's record is damaged; use another out=$"):
        folder.open(GOOD, [])


def test_control_characters_do_not_reach_a_terminal(folder: SweepFolder, tmp_path: Path) -> None:
    trials_file(folder).write_text(json.dumps([ROW | {"message": "a\x1b[2J\nb"}]))
    assert folder.trials()[0].message == r"a\x1b[2J b"
    log = tmp_path / "log"
    log.write_bytes(b"fine\nred\x1b[31m\n")
    assert RunningTrial(None, log, 0.0, 0).last_line() == r"red\x1b[31m"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a", "is not a mapping"), ("a: 1\na: 2", "the key 'a' is there twice, line 2"), ("a: [", "not valid YAML"),
        ("a: &a [*a]", "an alias stands for itself"), ("a: 2020-01-01", "write it in quotes"), ("\x00", "not valid"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"sweep=.*: not a readable YAML file \(.*\)$") as error:
        sweep_spec.load(str(path))
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


ODD: list[Any] = [
    None, 3, 2.5, True, "x", "", [], [3], {}, {"a": 1}, [[]], float("nan"), -1, 10**400, "${x}", {"parameters": 3},
    {"values": []}, {"min": "a", "max": 2}, {"value": [1, 2]}, {"min": 1, "max": 10**400},
]  # fmt: skip
PLACES = [
    (), ("method",), ("program",), ("metric",), ("metric", "name"), ("parameters",), ("parameters", "train_refiner.lr"),
    ("parameters", "train_refiner.lr", "min"), ("command",), ("command", 1), ("early_terminate",),
]  # fmt: skip


def put(value: Any, place: tuple[Any, ...], odd: Any) -> Any:
    """`value` with `odd` at a place in it."""
    if not place:
        return odd
    first, *rest = place
    changed = list(value) if isinstance(value, list) else dict(value)
    changed[first] = put(changed[first] if rest else None, tuple(rest), odd)
    return changed


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)) or "all")
def test_odd_values_anywhere_are_refused_in_one_line_or_work(place: tuple[Any, ...]) -> None:
    refused = []
    for odd in ODD:
        try:
            sweep_spec.check("mine", put(GOOD, place, odd))
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > len(ODD) // 2 or place == ("program",)
    assert all(len(line.splitlines()) == 1 for line in refused)
