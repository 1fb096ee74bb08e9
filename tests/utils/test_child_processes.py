"""Child processes: how they are started, what is heard of them, and that none outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from tests_support import environment

from dvae.errors import MachineError, UserError
from dvae.utils import machine
from dvae.utils.child_processes import Child, ChildFailure, ChildGroup, begin_child, handling

Send = Callable[[Any], None]
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def sleep(send: Send) -> None:
    send(os.getpid())
    time.sleep(60)


def ignore_sigterm(send: Send) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleep(send)


def count_to(limit: int, send: Send) -> None:
    for number in range(limit):
        send(number)


def report(send: Send) -> None:
    send((os.environ["WHO"], os.getpgrp() == os.getpid(), os.environ.get("OMP_NUM_THREADS")))


def fail(error: BaseException, send: Send) -> None:
    raise error


def die(send: Send) -> None:
    send("begun")
    os._exit(0)


def failed(child: Child) -> bool:
    return bool(child.status)


def wait_for(what: Callable[[], Any]) -> Any:
    """What a function returns, once that is true."""
    deadline = time.monotonic() + 30
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def gone(pid: int) -> bool:
    """Whether a process has ended, even if nobody has asked for its status."""
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_messages_come_in_order_and_the_last_one_before_the_end() -> None:
    heard: dict[int, list[int]] = {0: [], 1: []}
    with ChildGroup() as group:
        children = [group.start_function(number, count_to, 50 * (number + 1)) for number in range(2)]
        ended = group.wait(failed, on_message=lambda child, message: heard[child.number].append(message))
        assert group.running == []
    assert heard == {0: list(range(50)), 1: list(range(100))}
    assert set(map(id, ended)) == set(map(id, children))
    assert [(child.status, child.returned, child.failure) for child in children] == [(0, True, None)] * 2


def test_a_child_has_a_group_of_its_own_and_the_environment_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "cores", lambda: 6)
    heard: list[Any] = []
    with ChildGroup() as group:
        group.start_function(0, report, environment={"WHO": 7} | machine.thread_share(2))
        group.wait(failed, on_message=lambda child, message: heard.append(message))
    assert heard == [("7", True, "3")]
    assert "WHO" not in os.environ


def test_threads_that_the_user_has_set_stay() -> None:
    assert machine.thread_share(2, {"OMP_NUM_THREADS": "3"}) == {}
    assert machine.thread_share(1000, {}) == {"OMP_NUM_THREADS": 1}


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (UserError("n=0: use 1 or more"), ChildFailure("n=0: use 1 or more", 2)),
        (MachineError("the disk is full"), ChildFailure("the disk is full", 1)),
        (KeyboardInterrupt(), ChildFailure("interrupted: the same command again resumes", 130)),
        (KeyError("x\ny"), ChildFailure("KeyError: 'x\\ny'", 1)),
    ],
)
def test_an_error_reaches_the_parent_in_one_line(
    error: BaseException, failure: ChildFailure, capfd: pytest.CaptureFixture[str]
) -> None:
    with ChildGroup() as group:
        group.start_function(3, fail, error)
        (child,) = group.wait(failed)
    assert (child.number, child.failure, child.status, child.returned) == (3, failure, failure.status, False)
    assert ("Traceback" in capfd.readouterr().err) is isinstance(error, KeyError)


def test_a_child_that_dies_without_a_word_has_not_returned() -> None:
    with ChildGroup() as group:
        group.start_function(0, die)
        (child,) = group.wait(failed)
    assert (child.status, child.returned, child.failure) == (0, False, None)


def test_one_that_fails_ends_the_others_after_the_grace_period_even_those_that_ignore_sigterm() -> None:
    asked: list[tuple[list[int], list[int]]] = []

    def before_kill(ended: list[Child], running: list[Child]) -> None:
        asked.append(([child.number for child in ended], [child.number for child in running]))

    with ChildGroup() as group:
        deaf = group.start_function(0, ignore_sigterm)
        wait_for(lambda: list(deaf.receive()))
        deaf.send_signal(signal.SIGTERM)
        other = group.start_function(1, sleep)
        group.start_function(2, fail, UserError("no"))
        began = time.monotonic()
        ended = group.wait(failed, 0.5, before_kill=before_kill)
        assert time.monotonic() - began >= 0.5
    assert [child.number for child in ended] == [2]
    assert asked == [([2], [0, 1])]
    assert [deaf.status, other.status] == [-signal.SIGKILL] * 2


def test_leaving_the_block_kills_what_runs(tmp_path: Path) -> None:
    with ChildGroup() as group:
        children = [group.start_function(0, ignore_sigterm), group.start_program(1, SLEEP, tmp_path / "log")]
    assert [child.status for child in children] == [-signal.SIGKILL] * 2
    assert group.running == []


def test_signals_are_forwarded_and_remembered() -> None:
    handled: list[int] = []
    with handling([signal.SIGUSR1], lambda number, frame: handled.append(number)):
        with ChildGroup() as group, group.forwarding([signal.SIGUSR1, signal.SIGTERM]) as came:
            child = group.start_function(0, sleep)
            wait_for(lambda: list(child.receive()))
            os.kill(os.getpid(), signal.SIGUSR1)
            assert group.wait(lambda one: False) == [child]
        assert (came, child.status) == ([signal.SIGUSR1], -signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
    assert handled == [signal.SIGUSR1]


def test_a_program_adds_to_its_log_and_has_no_input(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['WHO'], repr(sys.stdin.read()), os.getpgrp() == os.getpid()); sys.exit(4)"
    with ChildGroup() as group:
        for who in ("first", "second"):
            group.start_program(1, [sys.executable, "-c", code], tmp_path / "log", {"WHO": who})
            (child,) = wait_for(group.ended)
            assert child.status == 4
    assert (tmp_path / "log").read_text() == "first '' True\nsecond '' True\n"


PARENT = """
import os, sys, time
from pathlib import Path
import test_child_processes as functions
from dvae.utils.child_processes import ChildGroup

if __name__ == "__main__":
    group = ChildGroup()
    if sys.argv[1] == "pool":
        pool = functions.pool(sys.argv[2])
        print(*{pool.submit(functions.slow_pid).result() for _ in range(9)}, flush=True)
    elif sys.argv[1] == "function":
        child = group.start_function(0, functions.ignore_sigterm)
        while not (heard := list(child.receive())):
            time.sleep(0.02)
        print(*heard, flush=True)
    else:
        print(group.start_program(0, functions.SLEEP, Path(os.devnull)).process.pid, flush=True)
    time.sleep(60)
"""


def pool(method: str) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(2, get_context(method), begin_child)


def slow_pid() -> int:
    time.sleep(0.05)
    return os.getpid()


@pytest.mark.parametrize("kind", ["function", "program", "pool spawn", "pool forkserver"])
def test_no_child_outlives_a_parent_that_is_killed(kind: str, tmp_path: Path) -> None:
    if kind == "program" and sys.platform != "linux":
        pytest.skip("prctl is Linux's")
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script), *kind.split()]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment(PYTHONPATH=os.pathsep.join(sys.path))
    ) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert pids
        assert not any(map(gone, pids))
        parent.kill()
    wait_for(lambda: all(map(gone, pids)))
