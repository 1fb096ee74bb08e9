"""attempts.jsonl as others may have written it: damage is one line that says what is safe."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dvae.errors import MachineError
from dvae.runs import attempts

ROW: dict[str, Any] = {
    "started": 1.7e9, "host": "here", "pid": 7, "launcher": "local", "count": 1, "cwd": "/", "job": "", "ended": None,
    "status": None, "message": "",
}  # fmt: skip


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    row = attempts.Attempt(**ROW | {"ended": 1.8e9, "status": 143, "message": "stopped  twice"})
    attempts.write(tmp_path, [row, row])
    assert (
        attempts.read(tmp_path)
        == [row.__class__(**ROW | {"ended": 1.8e9, "status": 143, "message": "stopped twice"})] * 2
    )
    assert attempts.read(tmp_path / "none") == []


def test_what_a_newer_version_adds_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / attempts.FILE).write_text(json.dumps(ROW | {"new": [1]}) + "\n")
    assert attempts.read(tmp_path) == [attempts.Attempt(**ROW)]


def line(**changes: Any) -> bytes:
    return json.dumps(ROW | changes).encode()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", None),
        (b"{", "line 1: is not valid JSON"),
        (b"null", "line 1: Input should be an object"),
        (line() + b"\n\n" + line(), "line 2: is not valid JSON"),
        (line()[:-1] + b', "pid": 8}', "line 1: is not valid JSON (the key 'pid' is there twice)"),
        (b"\xff\xfe" + line(), "is not UTF-8 text"),
        (b"[" * 100_000, "line 1: is nested too deeply"),
        (b'{"started": ' + b"9" * 10_000 + b"}", "line 1: is not valid JSON"),
        (json.dumps({key: ROW[key] for key in ROW if key != "pid"}).encode(), "line 1: pid: is missing"),
        (line(pid="7"), "line 1: pid: Input should be a valid integer"),
        (line(pid=-1), "line 1: pid: Input should be greater than or equal to 1"),  # a signal to it goes to everybody
        (line(pid=2**40), "line 1: pid: Input should be less than 2147483648"),
        (line(started=float("nan")), "line 1: started"),
        (line(started=1e300), "line 1: started: Input should be less than or equal to"),
        (line(ended=-1), "line 1: ended: Input should be greater than or equal to 0"),
        (line(status="0"), "line 1: status"),
        (line(status=10**6), "line 1: status"),
        (line(count=True), "line 1: count: Input should be a valid integer"),
        (line(host=None), "line 1: host: Input should be a valid string"),
        (line(message=["a"]), "line 1: message: Input should be a valid string"),
    ],
)
def test_damage_is_one_line(tmp_path: Path, data: bytes, reason: str | None) -> None:
    path = tmp_path / attempts.FILE
    path.write_bytes(data)
    if reason is None:
        assert attempts.read(tmp_path) == []
        return
    with pytest.raises(MachineError) as error:
        attempts.read(tmp_path)
    text = str(error.value)
    assert text.startswith(f"{path}: is damaged ({reason}")
    assert text.endswith("; delete it to go on, the run is safe")
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(("kind", "make"), [("a folder", Path.mkdir), ("a pipe", os.mkfifo)])
def test_what_is_no_file_is_told(tmp_path: Path, kind: str, make: Any) -> None:
    make(tmp_path / attempts.FILE)
    with pytest.raises(MachineError, match=rf"attempts\.jsonl: is damaged \(is {kind}, not a file\); delete it"):
        attempts.read(tmp_path)


def test_control_characters_do_not_reach_a_terminal(tmp_path: Path) -> None:
    (tmp_path / attempts.FILE).write_bytes(line(host="a\x1b[2Jb", message="one\ntwo\x07"))
    (found,) = attempts.read(tmp_path)
    assert (found.host, found.message) == (r"a\x1b[2Jb", r"one two\x07")


def test_an_end_needs_a_beginning(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="no attempt is on record"):
        attempts.close(tmp_path, 0, "")
