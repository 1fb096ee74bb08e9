"""Commands of dvae, run on data of a stranger: watched for what they must not do, bounded in memory and time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from tests_support import ROOT, environment

SECRET = "sk-7f6e5d4c3b2a1908"
"""The value of a variable of the environment that no output may hold."""
MEMORY = 2**30
"""Bytes that a command may take beyond its imports."""
SECONDS = 20.0


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    stderr: str
    events: list[str]
    memory: int
    seconds: float

    def shapes(self) -> set[str]:
        """The events, without the names of temporary files."""
        return {re.sub(r"/tmp/tmp\w+", "/tmp/X", event) for event in self.events}

    def faults(self, sound: bool | None = None, usual: Collection[str] = ()) -> list[str]:
        """What is wrong with that: nothing, if it succeeded or said why not in one line.

        `sound`: True demands success, False demands a refusal. `usual`: events (see `shapes`) of the command on sound
        data, such as DeepSpeed's search for a library.
        """
        lines = self.stderr.strip().splitlines()
        errors = [line for line in lines if line.startswith("dvae: error: ")]
        found = [f"event: {event}" for event in sorted(self.shapes() - set(usual))]
        if self.status not in (0, 1, 2):
            found.append(f"status {self.status}")
        if self.status and (len(errors) != 1 or errors[0] != lines[-1] or "Traceback" in self.stderr):
            found.append("no single line")
        if any(not one.isprintable() for line in errors for one in line):
            found.append("control characters")
        if SECRET in self.stderr:
            found.append("the secret was printed")
        if self.memory > MEMORY:
            found.append(f"{self.memory / 2**20:.0f} MiB")
        if self.seconds > SECONDS:
            found.append(f"{self.seconds:.0f} s")
        if sound is not None and (self.status == 0) != sound:
            found.append(f"status {self.status} where {'0' if sound else '1 or 2'} is right")
        return [*found, self.stderr[-600:]] if found else []


class Zygote:
    """The process that forks a child per command."""

    def __init__(self, warm: list[dict[str, Any]]) -> None:
        env = environment(PYTHONPATH=str(ROOT), WANDB_API_KEY=SECRET, CUDA_VISIBLE_DEVICES="")
        command = [sys.executable, str(Path(__file__).parent / "zygote.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, env=env, text=True, **pipes)  # type: ignore[call-overload]
        self._ask(warm)

    def _ask(self, job: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the zygote ended with status {self._process.wait()}"
        return json.loads(line)

    def run(self, tool: str, *words: str, cwd: Path, path: list[str] | None = None) -> Ended:
        """Run tools/TOOL.py in a child, with `path` first on its module path."""
        return Ended(**self._ask({"tool": tool, "words": list(words), "cwd": str(cwd), "path": path or []}))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


@contextmanager
def listening() -> Iterator[tuple[str, list[str]]]:
    """A web server that must hear nothing: its address, and what was asked of it."""
    heard: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.path)
            self.send_error(404)

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", heard
    finally:
        server.shutdown()
        server.server_close()
