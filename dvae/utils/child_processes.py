"""Child processes of a command. They are started, watched and ended here, and none outlives the command.

A child is either a Python function in a new interpreter, which can send messages to its parent, or a program. Each is
the leader of a process group, so that Ctrl-C reaches the parent alone, which decides what its children shall do.

A child ends with its parent, even if the parent is killed and can do nothing itself. A function watches the parent from
a thread (`end_with_parent`). The kernel kills a program, on Linux alone (`parent_death_signal`).
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from dvae.errors import summarize
from dvae.utils.secrets import guard_streams

POLL_SECONDS = 0.2
"""Seconds after which children are looked at again, even if nothing was heard of any."""
PR_SET_PDEATHSIG = 1
"""Linux, prctl(2): the signal that a process gets when its parent ends."""


@dataclass(frozen=True)
class ChildFailure:
    """Why the function of a child failed."""

    message: str
    """One line."""
    status: int
    """Exit status."""


class _Returned:
    """The last message of a child whose function has returned."""


@dataclass(eq=False)
class Child:
    """A child process."""

    number: int
    """Given by the caller: a rank, or a place in a list."""
    process: SpawnProcess | subprocess.Popen[bytes]
    messages: Connection | None = None
    """Where messages of a function arrive; None for a program, and once no more can come."""
    returned: bool = False
    """Whether its function has returned."""
    failure: ChildFailure | None = None
    """What its function raised."""

    @property
    def status(self) -> int | None:
        """Exit status; below 0 the signal that ended it; None while it runs."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal, if the child still runs."""
        if self.status is None and self.process.pid:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the end of the child, at most some seconds."""
        if isinstance(self.process, subprocess.Popen):
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        else:
            self.process.join(seconds)

    def receive(self) -> Iterator[Any]:
        """Messages that have arrived and are the caller's; what tells of the function's end is kept here."""
        # A grandchild may hold the other end open, so this asks whether something is there and never waits for it.
        while self.messages is not None and self.messages.poll():
            try:
                message = self.messages.recv()
            except EOFError:
                self.messages.close()
                self.messages = None
                return
            if isinstance(message, ChildFailure):
                self.failure = message
            elif isinstance(message, _Returned):
                self.returned = True
            else:
                yield message


class ChildGroup:
    """Children that live and die together. A context manager: who still runs when the block is left is killed."""

    def __init__(self) -> None:
        self.running: list[Child] = []
        """Children whose end `ended` has not returned yet."""

    def start_function(
        self,
        number: int,
        function: Callable[..., None],
        *arguments: Any,
        environment: Mapping[str, object] | None = None,
    ) -> Child:
        """Start function(*arguments, send) in a new interpreter; send(message) passes a message to this process.

        The child's environment is that of this process and `environment`. An error that the function raises is sent
        as well, and becomes the exit status.
        """
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run_function, args=(function, arguments, sender), name=f"child {number}")
        with _added_to_environment(environment or {}):  # libraries read variables as soon as they are loaded
            process.start()
        sender.close()
        return self._add(Child(number, process, receiver))

    def start_program(
        self, number: int, command: list[str], log: Path, environment: Mapping[str, object] | None = None
    ) -> Child:
        """Start a program without input, whose output is added to a log."""
        added = {name: str(value) for name, value in (environment or {}).items()}
        with log.open("ab") as out:
            process = subprocess.Popen(
                command, env=os.environ | added, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                process_group=0, preexec_fn=parent_death_signal(),
            )  # fmt: skip
        return self._add(Child(number, process))

    def _add(self, child: Child) -> Child:
        self.running = [*self.running, child]  # not in place, because a signal handler may be reading the list
        return child

    def ended(self, seconds: float = 0.0, on_message: Callable[[Child, Any], None] | None = None) -> list[Child]:
        """Wait up to some seconds until something happens. Returns the children that have ended since the last call."""
        sources = [child.messages for child in self.running if child.messages is not None]
        sentinels = [child.process.sentinel for child in self.running if isinstance(child.process, SpawnProcess)]
        if sources or sentinels:
            connection.wait([*sources, *sentinels], seconds)
        else:
            time.sleep(seconds)
        gone = [child for child in self.running if child.status is not None]  # before their last messages are read
        for child in self.running:
            for message in child.receive():
                if on_message:
                    on_message(child, message)
        self.running = [child for child in self.running if child not in gone]
        return gone

    def wait(
        self,
        failed: Callable[[Child], bool],
        grace: float = 0.0,
        on_message: Callable[[Child, Any], None] | None = None,
        before_kill: Callable[[list[Child], list[Child]], None] | None = None,
    ) -> list[Child]:
        """Wait until all children have ended. If one has failed, the others are killed `grace` seconds later.

        before_kill(ended, running) is called before that. Returns the children that ended by themselves, in the order
        in which they did.
        """
        ended: list[Child] = []
        deadline: float | None = None
        while self.running:
            new = self.ended(POLL_SECONDS, on_message)
            ended += new
            if deadline is None and any(map(failed, new)):
                deadline = time.monotonic() + grace
            if deadline is not None and time.monotonic() >= deadline:
                if before_kill:
                    before_kill(ended, self.running)
                self.kill()
        return ended

    def kill(self) -> None:
        """Kill all children that run, and wait for their ends."""
        for child in self.running:
            child.process.kill()
        for child in self.running:
            child.wait()
        self.running = []

    @contextmanager
    def forwarding(self, numbers: Iterable[int]) -> Iterator[list[int]]:
        """Pass signals on to all children while the block runs; gives the list of the signals that came."""
        came: list[int] = []

        def forward(number: int, frame: FrameType | None) -> None:
            came.append(number)
            for child in self.running:
                child.send_signal(number)

        with handling(numbers, forward):
            yield came

    def __enter__(self) -> ChildGroup:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()


@contextmanager
def handling(numbers: Iterable[int], handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Have signals handled by `handler` while the block runs, and by their earlier handlers afterwards."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def begin_child() -> None:
    """Call this first in a child that multiprocessing has started.

    The child becomes the leader of a process group, ends when its parent ends, and prints no secrets.
    """
    os.setpgrp()
    end_with_parent()
    guard_streams()


def end_with_parent() -> None:
    """End this child of multiprocessing as soon as its parent ends, even if the parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()


def parent_death_signal(number: int = signal.SIGKILL) -> Callable[[], None] | None:
    """A `preexec_fn` for subprocess.Popen: the kernel sends the program a signal when this process ends.

    None outside Linux.

    It counts as an end of this process if the thread that starts the program ends.
    """
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def request() -> None:
        prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it ended before the request
            os._exit(1)

    return request


def _run_function(function: Callable[..., None], arguments: tuple[Any, ...], sender: Connection) -> None:
    """The main function of a child that is a function."""
    begin_child()
    try:
        function(*arguments, sender.send)
    except BaseException as error:  # noqa: BLE001 the parent is told, whatever it is
        failure = ChildFailure(*summarize(error))
        sender.send(failure)
        sys.exit(failure.status)
    sender.send(_Returned())


@contextmanager
def _added_to_environment(more: Mapping[str, object]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in more.items()})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
