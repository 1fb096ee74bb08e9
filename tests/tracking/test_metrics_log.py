import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvae.errors import MachineError
from dvae.tracking.metrics import MetricsLog


def filled(path: Path) -> MetricsLog:
    log = MetricsLog(path)
    for stage, step in [("encoder", 1), ("encoder", 2), ("refiner", 1), ("refiner", 2), ("refiner", 3)]:
        log.append({"stage": stage, "step": step, "loss": 1 / step})
    return log


def steps(log: MetricsLog, stage: str) -> list[int]:
    return [row["step"] for row in log.rows(stage)]


def test_rows_come_back_as_written(tmp_path):
    log = filled(tmp_path / "metrics.jsonl")
    assert steps(log, "encoder") == [1, 2]
    assert log.rows()[4] == {"stage": "refiner", "step": 3, "loss": 1 / 3}
    assert MetricsLog(tmp_path / "none.jsonl").rows() == []


def test_rewind_drops_later_rows_of_that_stage_only(tmp_path):
    log = filled(tmp_path / "metrics.jsonl")
    log.rewind("refiner", 1)
    assert (steps(log, "encoder"), steps(log, "refiner")) == ([1, 2], [1])
    log.append({"stage": "refiner", "step": 2})
    assert steps(log, "refiner") == [1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]  # nothing left aside


@given(cut=st.integers(min_value=0, max_value=400), resume_at=st.integers(min_value=0, max_value=3))
def test_killed_anywhere_then_resumed_no_step_is_there_twice_or_missing(tmp_path_factory, cut, resume_at):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    filled(path)
    path.write_bytes(path.read_bytes()[:cut])  # what a killed process left
    log = MetricsLog(path)
    resume_at = min(resume_at, len(log.rows("refiner")))  # a checkpoint is saved after its step's row
    log.rewind("refiner", resume_at)
    for step in range(resume_at + 1, 4):
        log.append({"stage": "refiner", "step": step, "loss": 1 / step})
    assert steps(log, "refiner") == [1, 2, 3]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_number_that_is_not_finite_is_null(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"stage": "encoder", "step": 1, "loss": float("nan"), "kl": float("inf")})
    assert log.rows() == [{"stage": "encoder", "step": 1, "loss": None, "kl": None}]


@pytest.mark.parametrize("bad", ["not json", '{"step": 3}', "[1]"])
def test_a_damaged_line_is_named(tmp_path, bad):
    log = filled(tmp_path / "metrics.jsonl")
    lines = log.path.read_text().splitlines()
    log.path.write_text("\n".join([lines[0], bad, *lines[1:]]) + "\n")
    with pytest.raises(MachineError, match=r"metrics\.jsonl: line 2 is damaged"):
        log.rows()


def test_an_unwritable_file_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(MachineError, match=r"metrics\.jsonl: cannot be written"):
        MetricsLog(tmp_path / "metrics.jsonl").append({"stage": "encoder", "step": 1})
