"""W&B online while its server fails: training goes on, data are kept, and a line says how to send them."""

import base64
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from tests_support import ROOT
from wandb_server import Server

from dvae.errors import UserError
from dvae.tracking import wandb_run
from dvae.tracking.tracker import Tracker
from dvae.tracking.wandb_run import offline_rows
from dvae.tracking.wandb_settings import WandbConfig, WandbMode

ONLINE = WandbConfig(mode=WandbMode.online, project="test")
SECRET = "0123456789abcdef0123456789abcdef01234567"
STEPS = list(range(1, 41))


def serve(port: int = 0) -> Server:
    server = Server(port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def stop(server: Server) -> None:
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(tmp_path_factory, monkeypatch):
    home = str(tmp_path_factory.mktemp("home"))
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, home)
    monkeypatch.setattr(wandb_run, "OPEN", 8.0)
    monkeypatch.setattr(wandb_run, "CLOSE", 2.0)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    server = serve()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    yield server
    stop(server)


def session(run: Path, steps: list[int], stage: str = "refiner", in_the_middle=lambda: None) -> float:
    """One stage; returns the seconds that it took."""
    began = time.monotonic()
    with Tracker(run, ONLINE, stage) as tracker:
        tracker.rewind(stage, steps[0] - 1)
        for step in steps:
            if step == steps[len(steps) // 2]:
                in_the_middle()
            tracker.log(step, {"loss": 1 / step})
    return time.monotonic() - began


def told(capsys) -> list[str]:
    """Lines on stderr; nothing that W&B would say itself is among them, nor the key."""
    out, err = capsys.readouterr()
    assert SECRET not in out + err
    lines = err.splitlines()
    assert all(line.startswith("dvae: ") for line in lines), err
    return lines


def kept(line: str) -> list[int]:
    """Steps that the sessions hold which the line says to sync."""
    folders = re.search(r"wandb sync --include-online (.+)$", line).group(1).split()  # type: ignore[union-attr]
    rows = [row for folder in folders for path in Path(folder).glob("*.wandb") for row in offline_rows(path)]
    return [row["refiner/step"] for row in rows]


def arrived(server: Server) -> list[int]:
    return [int(step) for line in server.history for step in re.findall(r'"refiner/step": ?(\d+)', line)]


def no_secret_in(folder: Path) -> None:
    hidden = [SECRET.encode(), base64.b64encode(f"api:{SECRET}".encode())[:40]]
    for path in folder.rglob("*"):
        assert not path.is_file() or not any(text in path.read_bytes() for text in hidden), path


def test_the_server_dies_in_mid_run(tmp_path, server, capsys):
    assert session(tmp_path, STEPS, in_the_middle=lambda: stop(server)) < 60
    (line,) = told(capsys)
    assert "(Timed out finishing run.)" in line
    assert kept(line) == STEPS
    no_secret_in(tmp_path)

    revived = serve(server.server_port)
    sync = [sys.executable, "-m", "wandb", *re.search(r"wandb (sync .+)$", line).group(1).split()]
    synced = subprocess.run(sync, capture_output=True, text=True, timeout=60, check=False)
    assert synced.returncode == 0, synced.stderr

    assert arrived(revived) == STEPS
    stop(revived)


@pytest.mark.slow
def test_a_server_that_never_answers_and_comes_back(tmp_path, server, capsys):
    server.fault = "hangs"
    assert session(tmp_path, STEPS) < 60
    first, line = told(capsys)
    assert first.startswith("dvae: W&B is not available (")
    assert kept(line) == STEPS
    server.fault = ""
    session(tmp_path, [41, 42])
    assert told(capsys) == [
        "dvae: W&B is available again and has received the missing metrics: nothing is left to sync"
    ]
    assert arrived(server) == [*STEPS, 41, 42]
    no_secret_in(tmp_path)


def test_a_server_that_takes_no_rows(tmp_path, server, capsys):
    session(tmp_path, STEPS, in_the_middle=lambda: setattr(server, "fault", "forbids"))
    (line,) = told(capsys)
    assert kept(line) == STEPS


def test_its_helper_process_is_killed(tmp_path, server, capsys):
    def kill() -> None:
        for process in psutil.Process().children(recursive=True):
            if "wandb-core" in process.name():
                process.kill()
                process.wait()

    session(tmp_path, STEPS, in_the_middle=kill)
    first, last = told(capsys)
    assert first.startswith("dvae: W&B failed (")
    assert "wandb sync" in last
    session(tmp_path, [41, 42])  # the same process opens another
    assert "nothing is left to sync" in told(capsys)[0]
    assert arrived(server) == [*STEPS, 41, 42]


def test_a_refused_key_is_the_users_mistake_only_before_training(tmp_path, server, capsys):
    server.fault = "unauthorized"
    with pytest.raises(UserError, match=r"tracking\.wandb\.mode=online: .*401.*wandb login") as caught:
        session(tmp_path, STEPS)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    server.fault = ""
    session(tmp_path, STEPS)
    server.fault = "unauthorized"
    session(tmp_path, [41, 42])
    assert kept(told(capsys)[-1]) == [41, 42]


def test_a_run_has_a_group_job_types_its_code_and_machine(tmp_path, server, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "hunter2hunter2")
    (tmp_path / "config.yaml").write_text("recipe: demo\nurl: s3://me:hunter2@bucket/x\nmore: hunter2hunter2\n")
    for stage in ("encoder", "refiner"):
        session(tmp_path, [1, 2], stage)
    jobs = [given["jobType"] for given in server.upserts if given.get("jobType")]
    assert list(dict.fromkeys(jobs)) == ["encoder", "refiner"]
    assert {given["groupName"] for given in server.upserts if given.get("jobType")} == {"demo"}
    config = "".join(str(given.get("config")) for given in server.upserts)
    for word in ("recipe", "environment", "deepspeed", "version", os.uname().nodename):
        assert word in config
    assert "hunter2" not in config
    assert len(server.names) == 1


@pytest.mark.slow
def test_a_training_ends_normally_though_the_server_dies(tmp_path, server, tiny):
    words = ["run=mine", "stages=[shards,encoder]", "tracking.wandb.mode=online", "train_encoder.steps=100"]
    launch = [sys.executable, str(ROOT / "tools" / "launch.py"), *tiny, *words]
    with (tmp_path / "out").open("w") as out:
        training = subprocess.Popen(launch, cwd=tmp_path, stdout=out, stderr=out)
    while not (tmp_path / "mine" / "metrics.jsonl").exists():
        assert training.poll() is None, (tmp_path / "out").read_text()
        time.sleep(0.05)
    stop(server)
    assert training.wait(timeout=300) == 0
    said = (tmp_path / "out").read_text()
    (line,) = [line for line in said.splitlines() if "W&B" in line]
    assert "send them with: wandb sync --include-online mine/wandb/run-" in line
    assert (tmp_path / "mine" / "bundle" / "model.safetensors").exists()
    assert SECRET not in said
    no_secret_in(tmp_path / "mine")
