"""A process that has imported dvae and forks a child for each command, watched and bounded.

It reads one JSON object per line: {"tool", "words", "cwd", "path"}; and answers each with one line: how the command
ended, what it printed to stderr, which forbidden events an audit hook saw, how much memory it took beyond the imports,
and how long it took. Run by harness.py; a child is a real run of a tool, without the seconds that imports take.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from typing import Any

TOOLS = ("sample", "reconstruct", "edit", "convert", "shards", "runs", "components", "export", "evaluate", "launch")
FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "subprocess.Popen", "pty.spawn",
    "socket.connect", "socket.sendto", "socket.getaddrinfo", "urllib.Request", "ctypes.dlopen", "shutil.rmtree",
)  # fmt: skip
"""Audit events that reading data never causes."""
TIME_LIMIT = 30
"""Seconds after which a child is killed."""
MEMORY_LIMIT = 2**30
"""Bytes beyond those of the imports."""
events: list[str] = []
watching = False


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not watching:
        return
    if event in FORBIDDEN and not (event == "shutil.rmtree" and ".tmp" in str(arguments)):
        events.append(f"{event} {str(arguments)[:200]}")
    elif event == "import" and str(arguments[0]).partition(".")[0] == "evil_module":
        events.append(f"import {arguments[0]}")
    elif event == "open" and any(str(arguments[0]).endswith(name) for name in ("/secret.txt", "/etc/passwd")):
        events.append(f"open {arguments[0]}")


def pages(field: int) -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[field]) * resource.getpagesize()


def child(job: dict[str, Any], answer: int, errors: int) -> None:
    """Run one command and say how it ended."""
    global watching
    os.chdir(job["cwd"])
    sys.path[:0] = job.get("path", [])
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(errors, 2)
    resource.setrlimit(resource.RLIMIT_AS, (pages(0) + MEMORY_LIMIT, resource.RLIM_INFINITY))
    began, before, status = time.monotonic(), pages(1), 0
    from dvae.errors import run_command

    sys.addaudithook(hook)
    watching = True
    try:
        run_command(importlib.import_module(f"dvae.tools.{job['tool']}").command, job["words"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 whatever it is, the answer tells it
        traceback.print_exc()
        status = 70
    watching = False
    sys.stderr.flush()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    told = {"status": status, "events": events, "memory": most - before, "seconds": time.monotonic() - began}
    os.write(answer, json.dumps(told).encode())
    os._exit(0)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Fork a child for `job`, and wait for it."""
    reader, writer = os.pipe()
    errors = os.memfd_create("stderr")
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        os.setpgrp()
        try:
            child(job, writer, errors)
        finally:
            os._exit(71)
    os.close(writer)
    deadline, ended = time.monotonic() + TIME_LIMIT, 0
    while ended == 0 and time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.002)
    if ended == 0:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        told: dict[str, Any] = {"status": 124, "events": [], "memory": 0, "seconds": float(TIME_LIMIT)}
    else:
        data = os.read(reader, 2**20)
        told = (
            json.loads(data)
            if data
            else {"status": 128 + os.WTERMSIG(status), "events": [], "memory": 0, "seconds": 0.0}
        )
    os.close(reader)
    size = os.lseek(errors, 0, os.SEEK_END)
    text = os.pread(errors, min(size, 20_000), 0).decode("utf-8", "backslashreplace")
    os.close(errors)
    return told | {"stderr": text}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print when they are imported
    for name in TOOLS:
        importlib.import_module(f"dvae.tools.{name}")
    # a valid jobs.json makes `runs.py list` start squeue if SLURM is installed, which is right, and counts as an event
    importlib.import_module("dvae.runs.slurm.queue").is_available = lambda: False
    warm = json.loads(sys.stdin.readline())  # commands that import whatever is imported late
    for job in warm:
        pid = os.fork()
        if pid == 0:  # in a child too: torch's threads must not run in the parent
            os.chdir(job["cwd"])
            os.dup2(2, 1)
            importlib.import_module(f"dvae.tools.{job['tool']}").command(job["words"])
            os._exit(0)
        os.waitpid(pid, 0)
    # DeepSpeed asks the compiler for libaio when it is imported
    for name in ("deepspeed", "dvae.inference.pipeline", "dvae.inference.generation.generate", "dvae.runs.job",
                 "dvae.models.importers.convert_checkpoint", "dvae.config.validate",
                 "dvae.evaluation.sample_scores", "dvae.training.export", "torchvision.io", "PIL.Image"):  # fmt: skip
        importlib.import_module(name)
    from dvae.registry.discovery import discover

    discover()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
