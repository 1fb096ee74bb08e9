"""Stop a run on request. It completes the current step and saves a checkpoint first; a second signal ends it at once.

A request is SIGTERM, SIGINT (Ctrl-C), SIGUSR1, SIGUSR2, or a time limit. Signals are handled during training only.
Elsewhere there is nothing to save, so signals end the process as they do by default.
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
"""Time at which this process started, without the time of the imports before this module."""


class StopRequest:
    """Records whether this rank was asked to stop, and why.

    `max_hours` is the time limit of this attempt in hours (0: no limit). It counts from the start of the process.
    """

    def __init__(self, max_hours: float = 0.0) -> None:
        self.max_hours = max_hours
        self._signal = ""

    @property
    def stop_reason(self) -> str:
        """The name of the signal, or the time limit, that requests a stop. Empty if there is no request."""
        late = self.max_hours and time.monotonic() - PROCESS_START >= 3600 * self.max_hours
        return self._signal or (f"max_hours={self.max_hours:g}" if late else "")

    def reason_of_any_rank(self) -> str:
        """The reason of the first rank that has one. Empty if no rank has. Collective: every rank must call it."""
        # The cheap any_rank runs in every step. The reasons are exchanged only if there is one.
        reason = self.stop_reason
        return next(filter(None, ranks.all_gather(reason)), "") if ranks.any_rank(bool(reason)) else ""

    def raise_between_stages(self) -> None:
        """Raise Stopped on every rank if any rank was asked to stop, for example in the last step of a stage.

        Collective: every rank must call it.
        """
        if reason := self.reason_of_any_rank():
            raise Stopped(f"stopped after a stage ({reason}), saved: the same command again resumes", reason)

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handle signals while the block runs."""
        with handling(SIGNALS, self._on_signal):
            yield

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal:  # the second signal: let the default action end the process
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._signal = signal.Signals(number).name


_current = StopRequest()


def start_attempt(max_hours: float) -> StopRequest:
    """Start an attempt of a run in this process, with a new stop request."""
    global _current
    _current = StopRequest(max_hours)
    return _current


def current() -> StopRequest:
    """The stop request of the attempt that started last."""
    return _current
