"""Stopping on request: what asks first is kept until a step is done and saved; a second signal ends at once.

SIGTERM, SIGINT (Ctrl-C), SIGUSR1, SIGUSR2 and a time limit ask. Signals are heard in training alone: elsewhere there is
nothing to save, so there they end the process as they do by default.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dvae.errors import Stopped
from dvae.training.resilience import ranks
from dvae.utils.child_processes import handling

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
PROCESS_START = time.monotonic()
"""When this process began, except for the imports before this one."""


class StopRequest:
    """Whether this rank was asked to stop, and why. `max_hours` is the limit of this attempt (0: no limit)."""

    def __init__(self, max_hours: float = 0.0) -> None:
        self.max_hours = max_hours
        self._signal = ""

    @property
    def stop_reason(self) -> str:
        """What asked: a signal's name, or the time limit. Empty if nothing did."""
        late = self.max_hours and time.monotonic() - PROCESS_START >= 3600 * self.max_hours
        return self._signal or (f"max_hours={self.max_hours:g}" if late else "")

    def reason_of_any_rank(self) -> str:
        """What asked any of the ranks. Empty if nothing did. Collective."""
        reason = self.stop_reason
        return next(filter(None, ranks.all_gather(reason)), "") if ranks.any_rank(bool(reason)) else ""

    def raise_between_stages(self) -> None:
        """Raise Stopped on every rank if any was asked, as in the last step of a stage. Collective."""
        if reason := self.reason_of_any_rank():
            raise Stopped(f"stopped after a stage ({reason}), saved: the same command again resumes", reason)

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Listen for signals while the block runs."""
        with handling(SIGNALS, self._on_signal):
            yield

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._signal = signal.Signals(number).name


_current = StopRequest()


def start_attempt(max_hours: float) -> StopRequest:
    """Begin an attempt of a run in this process."""
    global _current
    _current = StopRequest(max_hours)
    return _current


def current() -> StopRequest:
    """The stop request of the attempt that began last."""
    return _current
