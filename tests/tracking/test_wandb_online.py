"""W&B online: the real client against a server of a few lines on this machine, which keeps what it is sent."""

import gzip
import json
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dvae.tracking.tracker import Tracker
from dvae.tracking.wandb_run import WandbConfig, WandbMode

ONLINE = WandbConfig(mode=WandbMode.online, project="test")


class Server(ThreadingHTTPServer):
    """One run: its history rows, its summary, and how often it was opened."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.history: list[str] = []
        self.summary = "{}"
        self.names: set[str] = set()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, operation: str, given: dict) -> dict:
        """The little of W&B's GraphQL that its client needs to open a run."""
        entity = {"id": "e", "name": "someone"}
        project = {"id": "p", "name": "test", "entity": entity}
        if operation == "UpsertBucket":
            self.names.add(given["name"])
            run = {"id": "r", "name": given["name"], "displayName": "d", "config": "{}", "project": project}
            return {"upsertBucket": {"inserted": True, "bucket": run | {"historyLineCount": len(self.history)}}}
        if operation == "RunResumeStatus":
            run = {"id": "r", "name": "n", "displayName": "d", "summaryMetrics": self.summary, "tags": []}
            tails = {"historyTail": json.dumps(self.history[-1:]), "eventsTail": "[]", "wandbConfig": '{"t": 1}'}
            counts = {"logLineCount": 0, "eventsLineCount": 0, "historyLineCount": len(self.history)}
            return {"model": {**project, "bucket": {**run, **tails, **counts, "config": "{}"} if self.names else None}}
        if operation == "CreateRunFiles":
            uploads = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in given["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": uploads}}
        if operation == "Viewer":
            return {"viewer": {"id": "v", "entity": "someone", "username": "u", "flags": "{}", "teams": {"edges": []}}}
        return {}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        raw = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
        answer: dict = {}
        if self.path.endswith("/file_stream"):
            sent = json.loads(raw).get("files", {})
            self.server.history += sent.get("wandb-history.jsonl", {}).get("content", [])
            self.server.summary = sent.get("wandb-summary.json", {}).get("content", [self.server.summary])[-1]
        elif self.path == "/graphql":
            asked = json.loads(raw)
            answer = {"data": self.server.answer(asked.get("operationName", ""), asked.get("variables") or {})}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_POST


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
from dvae.tracking.wandb_run import WandbConfig, WandbMode
tracker = Tracker(Path(sys.argv[1]), WandbConfig(mode=WandbMode.online, project="test"), "refiner")
tracker.rewind("refiner", 20)
for step in range(21, 61):
    tracker.log(step, {"loss": 1 / step})
os.kill(os.getpid(), signal.SIGKILL)
"""


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
