"""Runs that are killed at random moments, as often as asked: python killed_runs.py '{"words": [...], ...}'

Each attempt is forked from this process, which has imported torch and DeepSpeed once: seconds are saved at each. It is
the job of tools/launch.py, with the environment that torchrun sets. Prints how many kills met a save half-way.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import deepspeed  # noqa: F401

import dvae.runs.job  # noqa: F401 # imports all else that the job needs
from dvae.errors import run_command
from dvae.tools import launch


def start(words: list[str], rank: int, ranks: int, port: int, log: Path) -> int:
    """Process id of one rank's attempt."""
    child = os.fork()
    if child:
        return child
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    status = 0
    try:
        run_command(launch.command, words)
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(status)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def rows(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def attempt(words: list[str], run: Path, ranks: int, kill: bool, chance: random.Random) -> list[int]:
    """One attempt, killed a few steps after its first (each row is a step); statuses of the ranks."""
    port, log = free_port(), run.parent / "out.txt"
    children = [start(words, rank, ranks, port, log) for rank in range(ranks)]
    if kill:
        wanted = rows(run) + chance.randint(1, 8)
        while rows(run) < wanted:
            if os.waitpid(children[0], os.WNOHANG)[0]:
                raise SystemExit(f"an attempt ended before it could be killed: {log.read_text()[-2000:]}")
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))
        for child in children:
            os.kill(child, signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(words: list[str], run: str, ranks: int, kills: int, seed: int) -> None:
    chance, halfway = random.Random(seed), 0
    for _ in range(kills):
        statuses = attempt(words, Path(run), ranks, True, chance)
        if statuses != [-signal.SIGKILL] * ranks:
            raise SystemExit(f"ended with {statuses} before it could be killed")
        halfway += bool(list(Path(run).glob("checkpoints/*/.step-*")))
    statuses = attempt(words, Path(run), ranks, False, chance)
    if any(statuses):
        raise SystemExit(
            f"the last attempt ended with {statuses}: {(Path(run).parent / 'out.txt').read_text()[-2000:]}"
        )
    print(json.dumps({"kills": kills, "during a save": halfway}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
