import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvae.errors import MachineError
from dvae.tracking.metrics_log import MetricsLog


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


@pytest.mark.parametrize(
    "bad",
    [
        b"not json", b'{"step": 3}', b"[1]", b"", b"\xff", b"[" * 50_000, b"null", b'{"stage": "a", "step": "3"}',
        b'{"stage": 1, "step": 3}', b'{"stage": "", "step": 3}', b'{"stage": "a", "step": -1}',
        b'{"stage": "a", "step": 1.0}', b'{"stage": "a", "step": true}', b'{"stage": "a", "step": null}',
        b'{"stage": "a", "step": 99999999999999999999}', b'{"stage": "a", "step": ' + b"9" * 5000 + b"}",
        b'{"stage": "a", "step": 1, "step": 2}', b'{"stage": "a", "step": 1, "loss": [1]}',
        b'{"stage": "a", "step": 1, "loss": {}}', b'{"stage": "a", "step": 1, "loss": true}',
        b'{"stage": "a", "step": 1, "loss": NaN}', b'{"stage": "a", "step": 1, "loss": 1e999}',
        b'{"stage": "a", "step": 1, "loss": "0.1"}', b'{"stage": "a", "step": 1, "time": "now"}',
        b'{"stage": "a\\u001b[2J", "step": 1}', b'{"stage": "a", "step": 1, "a\\nb": 1}',
        b'{"stage": "a", "step": 1, "note": "\\u001b"}', b'{"stage": "a", "step": 1, "k": ' + b"9" * 400 + b"}",
    ],
)  # fmt: skip
def test_a_damaged_line_is_named(tmp_path, bad):
    log = filled(tmp_path / "metrics.jsonl")
    lines = log.path.read_bytes().splitlines()
    log.path.write_bytes(b"\n".join([lines[0], bad, *lines[1:]]) + b"\n")
    for read in (log.rows, lambda: log.rewind("encoder", 1)):
        with pytest.raises(MachineError, match=r"metrics\.jsonl: line 2 is damaged \(.*\); delete that line to go on$"):
            read()
    with pytest.raises(MachineError, match=r"metrics\.jsonl: is"):
        log.tail()


def test_text_null_and_rare_line_breaks_are_data(tmp_path):
    log = filled(tmp_path / "metrics.jsonl")
    row = {"stage": "é", "step": 0, "note": "Füße", "loss": None, "more": 2**62}
    log.append(row)
    log.append({"stage": "encoder", "step": 9})
    assert log.rows("é") == [row]
    assert log.tail()[-2:] == [row, {"stage": "encoder", "step": 9}]


def test_a_torn_last_line_is_left_out_however_long_it_is(tmp_path):
    log = filled(tmp_path / "metrics.jsonl")
    whole = log.path.read_bytes()
    with log.path.open("ab") as file:
        file.write(b'{"stage": "refiner", "note": "' + b"x" * 200_000)
    assert len(log.rows()) == 5
    MetricsLog(log.path).append({"stage": "refiner", "step": 4})
    assert log.path.read_bytes() == whole + b'{"stage": "refiner", "step": 4}\n'


def test_the_tail_is_read_without_the_beginning(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    line = b'{"stage": "refiner", "step": 1, "note": "' + b"x" * 1000 + b'"}\n'
    log.path.write_bytes(b"damaged\n" + line * 100)
    assert len(log.tail()) == 65536 // len(line)


@pytest.mark.parametrize(("kind", "make"), [("a folder", Path.mkdir), ("a pipe", os.mkfifo)])
def test_what_is_no_file_is_named(tmp_path, kind, make):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    make(log.path)
    for read in (log.rows, log.tail, log.newest, lambda: log.rewind("encoder", 1)):
        with pytest.raises(MachineError, match=rf"metrics\.jsonl: is {kind}, not a file"):
            read()
    with pytest.raises(MachineError, match=r"metrics\.jsonl: cannot be written"):
        log.append({"stage": "encoder", "step": 1})


def test_a_file_that_no_run_could_write_is_not_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse: it takes no room on the disk
    with pytest.raises(MachineError, match="bytes, more than"):
        MetricsLog(path).rows()


def test_an_unwritable_file_is_named(tmp_path):
    with pytest.raises(MachineError, match=r"metrics\.jsonl: cannot be written"):
        MetricsLog(tmp_path / "none" / "metrics.jsonl").append({"stage": "encoder", "step": 1})
