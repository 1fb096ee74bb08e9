"""tools/runs.py: what it says of runs in every state, and what it does to those that go on."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests_support import ROOT, Tool, environment

from dvae.errors import MachineError, UserError
from dvae.runs import attempts, manage, records
from dvae.runs.attempts import Attempt
from dvae.runs.manage import RunState
from dvae.tools.runs import command, parse

CONFIG = """
run: {run}
recipe: demo
stages: [shards, encoder, refiner]
train_encoder: {{steps: 100, batch: 8}}
train_refiner: {{steps: 50, batch: 8}}
"""
STAGES = """
import sys, time
from pathlib import Path
from dvae.runs import attempts
with attempts.recorded(Path(sys.argv[1]), "local", 1):
    print("begun", flush=True)
    time.sleep(60)
"""


def make(folder: Path, done: tuple[str, ...] = (), **last: Any) -> Path:
    """A run folder: its finished stages, a row of the encoder, and its last attempt (none where nothing is given)."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(run=folder))
    records.write_format(folder)
    if done:
        (folder / "stages.json").write_text(json.dumps({stage: {} for stage in done}))
        row = {"stage": "encoder", "step": 40, "time": time.time() - 65, "loss": 0.5, "images_per_second": 16.0}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n" + '{"stage": "enc')
    if last:
        attempt = {"started": 0.0, "host": socket.gethostname(), "pid": os.getpid(), "launcher": "local", "count": 1}
        attempts.write(folder, [Attempt(**attempt | {"cwd": str(folder.parent)} | last)])
    return folder


def begin(folder: Path) -> subprocess.Popen[str]:
    """An attempt that does nothing, in a process of its own."""
    process = subprocess.Popen([sys.executable, "-c", STAGES, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize(
    ("done", "last", "state", "said"),
    [
        ((), {}, RunState.waiting, "no attempt is on record"),
        (("shards",), {}, RunState.stopped, "no attempt is on record"),
        (("shards", "encoder", "refiner"), {}, RunState.finished, ""),
        (("shards", "encoder", "refiner"), {"ended": 1.0, "status": 0}, RunState.finished, ""),
        (("shards",), {"ended": 1.0, "status": 0, "message": "finished"}, RunState.waiting, "stages were added"),
        (("shards",), {"ended": 1.0, "status": 143, "message": "stopped at 40"}, RunState.stopped, "stopped at 40"),
        (("shards",), {"ended": 1.0, "status": 130, "message": "interrupted"}, RunState.stopped, "interrupted"),
        (("shards",), {"ended": 1.0, "status": 1, "message": "no space"}, RunState.failed, "no space"),
        (("shards",), {"pid": 7}, RunState.failed, "killed, pid 7"),
    ],
)
def test_states(done: tuple[str, ...], last: dict[str, Any], state: RunState, said: str, tmp_path: Path) -> None:
    status = manage.run_status(make(tmp_path / "run", done, **last))
    assert status.state is state
    assert said in status.message
    assert status.eta is None


def test_a_run_that_goes_on_has_step_speed_and_time_left(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", ("shards",))
    process = begin(folder)
    status = manage.run_status(folder)
    assert (status.state, status.stage, status.step, status.total) == (RunState.running, "encoder", 40, 100)
    assert status.images_per_second == 16.0
    assert status.eta == (100 - 40) * 8 / 16.0
    assert status.age == pytest.approx(65, abs=20)
    assert f"pid {process.pid} on {socket.gethostname()} (local)" in status.message
    process.kill()
    process.wait()
    assert manage.run_status(folder).state is RunState.failed


def test_the_list_has_every_run_and_only_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = make(tmp_path / "a", ("shards", "encoder", "refiner"))
    (whole / "bundle").mkdir()
    (whole / "bundle" / "config.yaml").write_text("x: 1")
    make(tmp_path / "deeper" / "b", ("shards",), ended=1.0, status=1, message="no space left")
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "config.yaml").write_text("x: 1")
    (tmp_path / "given" / "bundle.json").write_text("{}")
    (make(tmp_path / "c") / "config.yaml").write_text("stages: [")
    command([f"in={tmp_path}"])
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["run", "state", "stage", "step", "images/s", "left", "last", "row", "message"]
    assert [re.split(r"\s+", line)[:2] for line in lines] == [
        [str(whole), "finished"], [str(tmp_path / "c"), "damaged"], [str(tmp_path / "deeper" / "b"), "failed"],
    ]  # fmt: skip
    assert "is not valid YAML" in lines[1]
    assert re.search(r"encoder +40/100 +1:\d\d ago +no space left$", lines[2])
    command(["list", f"in={whole / 'bundle'}"])
    assert "bundle" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["folow", "run=x"], "did you mean 'follow'"),
        (["follow"], "follow needs a run: add run=FOLDER"),
        (["list", "run=x"], "list: unknown word 'run=x': use in=FOLDER"),
        (["cancel", "runs/x"], "run=runs/x: no run is there (it has no config.yaml)"),
        (["cancel", "runs/x", "runs/y"], "unknown word 'runs/y'"),
        (["list", "/nowhere"], "in=/nowhere: no such folder"),
        (["runs/x"], "unknown word 'runs/x': known: cancel, follow, list, resume"),
        (["follow", "run=/nowhere"], "run=/nowhere: no run is there (it has no config.yaml)"),
        (["in=/nowhere"], "in=/nowhere: no such folder"),
    ],
)
def test_wrong_words(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        command(words)


def test_words() -> None:
    assert parse([]) == parse(["list"]) == ("list", Path("runs"))
    assert parse(["in=x"]) == ("list", Path("x"))
    assert parse(["cancel", "run=x"]) == ("cancel", Path("x"))


def test_an_attempt_is_recorded_however_it_ends(tmp_path: Path) -> None:
    folder = make(tmp_path / "run")
    with attempts.recorded(folder, "local", 1):
        (open_row,) = attempts.read(folder)
        assert open_row.ended is None
        with pytest.raises(UserError, match="in use by another process"), attempts.recorded(folder, "local", 1):
            pass
    for error in (UserError("a\nline"), KeyboardInterrupt(), ValueError("odd")):
        with pytest.raises(type(error)), attempts.recorded(folder, "processes", 2):
            raise error
    rows = attempts.read(folder)
    assert [row.status for row in rows] == [0, 2, 130, 1]
    assert [row.message for row in rows][1:] == ["a line", "interrupted: the same command again resumes",
                                                 "ValueError: odd"]  # fmt: skip
    assert all(row.ended and row.ended >= row.started > time.time() - 60 for row in rows)
    (folder / attempts.FILE).write_text("{\n")
    with pytest.raises(MachineError, match=r"attempts\.jsonl: is damaged"):
        attempts.read(folder)


def test_what_must_not_be_canceled_is_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is waiting: there is nothing to cancel"):
        list(manage.cancel(make(tmp_path / "waiting")))
    elsewhere = make(tmp_path / "elsewhere", host="other")
    with attempts.hold(elsewhere, attempts.LAUNCHER), pytest.raises(UserError, match="runs on other"):
        list(manage.cancel(elsewhere))
    by_tool = make(tmp_path / "tool", ended=1.0, status=0)
    with attempts.hold(by_tool, attempts.WORKER), pytest.raises(UserError, match="has no running attempt"):
        list(manage.cancel(by_tool))
    bystander = subprocess.Popen(["sleep", "60"])
    taken = make(tmp_path / "taken", pid=bystander.pid)
    with attempts.hold(taken, attempts.LAUNCHER), pytest.raises(UserError, match="is another process here"):
        list(manage.cancel(taken))
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_an_attempt_that_dies_of_the_signal_is_recorded_as_stopped(tmp_path: Path) -> None:
    folder = make(tmp_path / "run")
    process = begin(folder)
    lines = list(manage.cancel(folder))
    assert process.wait(timeout=10) == -signal.SIGTERM
    assert lines[0].endswith(f"SIGTERM to pid {process.pid} (local); waiting for it to save and end")
    assert "ended by SIGTERM outside training" in lines[1]
    assert manage.run_status(folder).state is RunState.stopped


def test_what_cannot_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    many = make(tmp_path / "many", launcher="torchrun", count=2, ended=1.0, status=1)
    with pytest.raises(UserError, match="started by torchrun on 2 ranks: give that command again"):
        manage.enter_start_folder(many)
    make(tmp_path / "here", ended=1.0, status=1).rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"was made as run=.*here in .*give the launch command again"):
        manage.enter_start_folder(tmp_path / "moved")
    busy = make(tmp_path / "busy")
    with attempts.hold(busy, attempts.LAUNCHER), pytest.raises(UserError, match="is running already"):
        manage.enter_start_folder(busy)


@pytest.mark.slow
def test_a_training_is_listed_followed_canceled_and_resumed(tiny: list[str], tmp_path: Path, tool: Tool) -> None:
    """Launched at one place by a relative name, looked after from another."""
    home, steps = tmp_path / "home", 300
    home.mkdir()
    words = [*tiny, "run=r/mine", "stages=[shards,encoder]", f"train_encoder.steps={steps}"]
    launch = [sys.executable, str(ROOT / "tools" / "launch.py"), *words, "train_encoder.preview_every=0"]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(launch, cwd=home, env=environment(), stdout=out, stderr=out)
    folder = home / "r" / "mine"
    while not (folder / "metrics.jsonl").exists():
        assert process.poll() is None, (tmp_path / "out").read_text()
        time.sleep(0.02)
    followed = manage.follow(folder)
    assert re.match(rf"encoder: \d+/{steps}  [\d.e+]+ images/s  loss [\d.]+  \d+:\d\d left$", next(followed))
    status = manage.run_status(folder)
    assert (status.state, status.stage, status.total) == (RunState.running, "encoder", steps)
    said = list(manage.cancel(folder))
    assert process.wait(timeout=60) == 143
    assert re.search(r"stopped at encoder step \d+ \(SIGTERM\), saved", said[1])
    assert list(followed)[-1] == f"{folder} is stopped: {said[1].partition(': ')[2]}"

    done = tool("runs", "resume", f"run={folder}")
    assert done.returncode == 0, done.stderr
    assert manage.run_status(folder).state is RunState.finished
    rows = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, steps + 1))
    assert [(row.launcher, row.status) for row in attempts.read(folder)] == [("local", 143), ("local", 0)]
    assert list(manage.follow(folder))[-1] == f"{folder} is finished"


@pytest.mark.parametrize(
    ("changed", "eta", "line"),
    [
        ({}, True, "encoder: 40/100  16 images/s  loss 0.5  0:30 left"),
        ({"time": None}, True, "encoder: 40/100  16 images/s  loss 0.5  0:30 left"),
        ({"images_per_second": None}, False, "encoder: step 40  time 1.0  loss 0.5  images_per_second None"),
        ({"images_per_second": 0.0}, False, "encoder: 40/100  0 images/s  loss 0.5"),
        ({"images_per_second": -3.0}, False, "encoder: 40/100  -3 images/s  loss 0.5"),
        ({"images_per_second": 5e-324}, False, "encoder: 40/100  4.941e-324 images/s  loss 0.5"),
        ({"step": 10**15}, True, "encoder: 1000000000000000/100  16 images/s  loss 0.5  0:00 left"),
        ({"loss": None}, True, "encoder: 40/100  16 images/s  0:30 left"),
    ],
)
def test_rows_with_odd_figures_are_shown(changed: dict[str, Any], eta: bool, line: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "run", ("shards",))
    row = {"stage": "encoder", "step": 40, "time": 1.0, "loss": 0.5, "images_per_second": 16.0} | changed
    text = json.dumps(row) + "\n"
    (folder / "metrics.jsonl").write_text(text)
    with attempts.hold(folder, attempts.LAUNCHER):
        status = manage.run_status(folder, [])
        assert (status.eta is not None) == eta
        assert (status.age is None) == ("time" in changed)
        assert manage.table_cells(folder, [])[1] == "running"
    assert manage.progress_line(row, manage._config(folder), folder) == line


def test_a_row_without_its_time_is_followed(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", ("shards", "encoder", "refiner"))
    (folder / "metrics.jsonl").write_text('{"stage": "encoder", "step": 1}\n{"stage": "encoder", "step": 2}\n')
    assert list(manage.follow(folder))[-1] == f"{folder} is finished"


def test_nothing_in_the_table_moves_the_cursor(tmp_path: Path) -> None:
    make(tmp_path / "a\x1b[2Jb", ("shards",), message="\x1b[2J", ended=1.0, status=1)
    (make(tmp_path / "c") / "stages.json").write_text('{"\\u001b[2J": 3}')
    lines = list(manage.run_table(tmp_path))
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
    assert r"a\x1b[2Jb" in lines[1]
    assert "damaged" in lines[2]


@pytest.mark.parametrize("made", ['"a\\0b"', "loop", '"\\e[2J"', "/", "..", '"' + "x" * 5000 + '"'])
def test_a_run_that_claims_to_be_elsewhere_is_not_resumed(
    made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    folder = make(tmp_path / "run", ("shards",))
    (folder / "config.yaml").write_text(CONFIG.format(run=made))
    with pytest.raises(UserError, match=r"which is another folder now: give the launch command again"):
        manage.enter_start_folder(folder)
