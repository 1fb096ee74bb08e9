"""Stopping on request: the first SIGTERM or Ctrl-C is kept until a step is done and saved; a second ends at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dvae.errors import MachineError


class Stopped(MachineError):
    """The run was asked to stop, and saved what it had. Exit status 143: terminated, to be continued."""

    exit_status = 143


class Stopping:
    """Whether somebody asked."""

    def __init__(self) -> None:
        self.asked = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked = True


@contextmanager
def on_signals() -> Iterator[Stopping]:
    """Listen for SIGTERM and SIGINT while the block runs."""
    stopping = Stopping()
    before = {number: signal.signal(number, stopping._ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
