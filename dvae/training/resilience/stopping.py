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

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
BEGAN = time.monotonic()
"""When this process began, but for the imports before this one."""


class Stopping:
    """Whether somebody asked this rank to stop, and who; `max_hours` (0: no limit) are those of this attempt."""

    def __init__(self, max_hours: float = 0.0) -> None:
        self.max_hours = max_hours
        self._signal = ""

    @property
    def why(self) -> str:
        """What asked: a signal's name, or the time limit; empty where nothing did."""
        late = self.max_hours and time.monotonic() - BEGAN >= 3600 * self.max_hours
        return self._signal or (f"max_hours={self.max_hours:g}" if late else "")

    def agreed(self) -> str:
        """What asked any of the ranks; empty where nothing did. Collective."""
        why = self.why
        return next(filter(None, ranks.all_gather(why)), "") if ranks.any_rank(bool(why)) else ""

    def between_stages(self) -> None:
        """Raise Stopped on every rank where any was asked, as in the last step of a stage. Collective."""
        if why := self.agreed():
            raise Stopped(f"stopped after a stage ({why}), saved: the same command again resumes", why)

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Listen for signals while the block runs."""
        before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._signal = signal.Signals(number).name


_current = Stopping()


def begin(max_hours: float) -> Stopping:
    """An attempt of a run begins in this process."""
    global _current
    _current = Stopping(max_hours)
    return _current


def current() -> Stopping:
    """That of the attempt that began last."""
    return _current
