"""Start, watch and end the child processes of a command. No child outlives the command.

There are two kinds of children:

- A Python function in a new interpreter. It can send messages to its parent.
- A program.

Each child leads its own process group, so Ctrl-C reaches only the parent. The parent decides whether to pass it on.

A child ends when its parent ends, even if the parent is killed by SIGKILL:

- A function watches its parent from a thread (`end_with_parent`).
- The kernel kills a program (`parent_death_signal`, on Linux only).
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
"""Seconds between two checks of the children if none sends a message."""
PR_SET_PDEATHSIG = 1
"""The option of prctl(2) on Linux that sets the signal a process receives when its parent ends."""


@dataclass(frozen=True)
class ChildFailure:
    """The error that ended a child's function."""

    message: str
    """The error in one line."""
    status: int
    """The exit status of the child."""


class _Returned:
    """The last message that a child sends if its function returns without an error."""


@dataclass(eq=False)
class Child:
    """A child process."""

    number: int
    """A rank or a list index, chosen by the caller."""
    process: SpawnProcess | subprocess.Popen[bytes]
    """The process: SpawnProcess for a function, Popen for a program."""
    messages: Connection | None = None
    """The receiving end of the function's pipe. None for a program, and after the pipe is closed."""
    returned: bool = False
    """Whether the function has returned without an error."""
    failure: ChildFailure | None = None
    """The error that the function raised, or None."""

    @property
    def status(self) -> int | None:
        """The exit status. None while the child runs; minus the signal number if a signal ended it."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def send_signal(self, number: int) -> None:
        """Send the signal `number` if the child still runs."""
        if self.status is None and self.process.pid:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the child ends, for at most `seconds` (None: without a limit)."""
        if isinstance(self.process, subprocess.Popen):
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        else:
            self.process.join(seconds)

    def receive(self) -> Iterator[Any]:
        """Yield the messages that have arrived, without waiting.

        The message that reports the end of the function is not yielded. It sets `returned` or `failure`.
        """
        # A grandchild may hold the other end of the pipe open. A recv() that waits might then never return, so
        # poll() is called first.
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
    """A group of children. As a context manager, it kills the children that still run when the block ends."""

    def __init__(self) -> None:
        self.running: list[Child] = []
        """The children that `ended` has not returned yet."""

    def start_function(
        self,
        number: int,
        function: Callable[..., None],
        *arguments: Any,
        environment: Mapping[str, object] | None = None,
    ) -> Child:
        """Start function(*arguments, send) in a new interpreter.

        The function calls send(message) to pass a message to this process. If the function raises an error, the child
        sends it to this process and ends with the error's exit status.

        Args:
            number: A rank or a list index, stored in the child.
            function: The function. It must be picklable, as the arguments and messages must.
            arguments: Its positional arguments.
            environment: Variables that are added to the environment of this process.
        """
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run_function, args=(function, arguments, sender), name=f"child {number}")
        # The child inherits the environment when it starts. Setting variables in the child itself would be too late,
        # because libraries read them when they are loaded.
        with _added_to_environment(environment or {}):
            process.start()
        sender.close()
        return self._add(Child(number, process, receiver))

    def start_program(
        self, number: int, command: list[str], log: Path, environment: Mapping[str, object] | None = None
    ) -> Child:
        """Start a program without input. Its stdout and stderr are appended to the file `log`."""
        added = {name: str(value) for name, value in (environment or {}).items()}
        with log.open("ab") as out:
            process = subprocess.Popen(
                command, env=os.environ | added, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                process_group=0, preexec_fn=parent_death_signal(),
            )  # fmt: skip
        return self._add(Child(number, process))

    def _add(self, child: Child) -> Child:
        self.running = [*self.running, child]  # a new list, because a signal handler may be iterating over the old one
        return child

    def ended(self, seconds: float = 0.0, on_message: Callable[[Child, Any], None] | None = None) -> list[Child]:
        """Wait for a message or the end of a child, for at most `seconds`.

        Calls on_message(child, message) for every message that has arrived. Returns the children that have ended since
        the last call.
        """
        sources = [child.messages for child in self.running if child.messages is not None]
        sentinels = [child.process.sentinel for child in self.running if isinstance(child.process, SpawnProcess)]
        if sources or sentinels:
            connection.wait([*sources, *sentinels], seconds)
        else:
            time.sleep(seconds)
        # This list is made before the messages are read. Every child in it has thus already sent its last message.
        gone = [child for child in self.running if child.status is not None]
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
        """Wait until all children have ended. If one fails, kill the others after `grace` seconds.

        Args:
            failed: failed(child) says whether a child that has ended counts as failed.
            grace: Seconds between the first failure and the kill.
            on_message: on_message(child, message) is called for every message.
            before_kill: before_kill(ended, running) is called once before the kill.

        Returns:
            The children that were not killed here, in the order in which they ended.
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
        """Kill all children that still run, and wait until they have ended."""
        for child in self.running:
            child.process.kill()
        for child in self.running:
            child.wait()
        self.running = []

    @contextmanager
    def forwarding(self, numbers: Iterable[int]) -> Iterator[list[int]]:
        """Pass the signals `numbers` on to all children while the block runs.

        Yields a list, to which each signal that arrives is appended.
        """
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
    """Install `handler` for the signals `numbers` while the block runs, and restore the earlier handlers afterwards."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def begin_child() -> None:
    """Prepare a child that multiprocessing has started. Call this first in the child.

    The child becomes the leader of a process group, ends when its parent ends, and prints no secrets.
    """
    os.setpgrp()
    end_with_parent()
    guard_streams()


def end_with_parent() -> None:
    """Kill this process as soon as its parent ends, even if the parent is killed.

    This process must be a child that multiprocessing has started.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()


def parent_death_signal(number: int = signal.SIGKILL) -> Callable[[], None] | None:
    """Return a `preexec_fn` for subprocess.Popen, so that the kernel signals the program when this process ends.

    The kernel also sends the signal `number` if only the thread that started the program ends.

    Returns:
        The function, or None on other systems than Linux.
    """
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def request() -> None:
        prctl(PR_SET_PDEATHSIG, number)
        # If the parent ended before prctl() was called, the kernel sends no signal.
        if os.getppid() != parent:
            os._exit(1)

    return request


def _run_function(function: Callable[..., None], arguments: tuple[Any, ...], sender: Connection) -> None:
    """Run a child's function, and send its result or its error to the parent."""
    begin_child()
    try:
        function(*arguments, sender.send)
    except BaseException as error:  # noqa: BLE001 every error must reach the parent
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
