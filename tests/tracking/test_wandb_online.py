"""W&B online: the real client against a server of a few lines on this machine, which keeps what it is sent."""

import json
import signal
import subprocess
import sys
import threading

import pytest
from wandb_server import Server

from dvae.tracking.tracker import Tracker
from dvae.tracking.wandb_settings import WandbConfig, WandbMode

ONLINE = WandbConfig(mode=WandbMode.online, project="test")


@pytest.fixture
def server(tmp_path_factory, monkeypatch):
    home = str(tmp_path_factory.mktemp("home"))
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, home)
    with Server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


KILLED = """
import os, signal, sys, time
from pathlib import Path
from dvae.tracking.tracker import Tracker
from dvae.tracking.wandb_settings import WandbConfig, WandbMode
tracker = Tracker(Path(sys.argv[1]), WandbConfig(mode=WandbMode.online, project="test"), "refiner")
tracker.rewind("refiner", 20)
for step in range(21, 61):
    tracker.log(step, {"loss": 1 / step})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_run_killed_and_resumed_has_every_row_once(tmp_path, server):
    with Tracker(tmp_path, ONLINE, "refiner") as tracker:
        tracker.rewind("refiner", 0)
        for step in range(1, 31):
            tracker.log(step, {"loss": 1 / step})
    assert len(server.history) == 30
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    with Tracker(tmp_path, ONLINE, "refiner") as tracker:
        tracker.rewind("refiner", 50)  # beyond what the server has: the rows between come from metrics.jsonl
        for step in range(51, 71):
            tracker.log(step, {"loss": 1 / step})
    rows = [json.loads(line) for line in server.history]
    assert [(row["refiner/step"], row["refiner/loss"]) for row in rows] == [(s, 1 / s) for s in range(1, 71)]
    assert [row["_step"] for row in rows] == list(range(70))
    assert len(server.names) == 1
    assert [row["step"] for row in tracker.metrics.rows()] == list(range(1, 71))
