"""Show the progress of long work: a bar on a terminal, or a line every few seconds if stderr is not a terminal."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from dvae.utils.secrets import scrub

LINE_EVERY = 10.0
"""Seconds between two lines if stderr is not a terminal."""
WINDOW = 15.0
"""Seconds over which images/s is averaged."""


class Progress:
    """Context manager that shows the progress of `total` steps on stderr.

    Args:
        label: The name of the work.
        total: The number of steps.
        start: The number of steps that are already done.
        quiet: Print nothing.
    """

    def __init__(self, label: str, total: int, start: int = 0, quiet: bool = False) -> None:
        self.quiet = quiet
        self.label, self.total, self.start, self.step = label, total, start, start
        self._metrics: Mapping[str, float] = {}
        self._images = 0
        self._printed_step = start
        self._bar: Bar | None = None
        self.begin()

    def begin(self) -> None:
        """Restart the clock, from which the rate and the remaining time are computed."""
        self._began = self._printed_at = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque([(self._began, 0)])

    def __enter__(self) -> Progress:
        self.begin()
        if sys.stderr.isatty() and not self.quiet:
            columns = (TextColumn("{task.description:<10}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.start, text=self.text())
            self._bar.start()
        return self

    def update(self, step: int, images: int = 0, metrics: Mapping[str, float] | None = None) -> None:
        """Report that `step` steps are done.

        Args:
            step: The number of steps that are done.
            images: Images processed since the last call.
            metrics: Values to show, such as the loss. If empty, the earlier ones stay.
        """
        now = time.monotonic()
        self.step = step
        self._images += images
        self._metrics = metrics or self._metrics
        self._recent.append((now, self._images))
        while len(self._recent) > 2 and now - self._recent[1][0] > WINDOW:
            self._recent.popleft()
        if self._bar:
            self._bar.update(self._task, completed=step, text=self.text())
        elif now - self._printed_at >= LINE_EVERY:
            self._print(now)

    def text(self) -> str:
        """Return the text beside the bar, such as "1200/5000 24%  182 images/s  loss 0.0123  2:13 left"."""
        parts = [f"{self.step}/{self.total} {100 * self.step / max(self.total, 1):.0f}%"]
        if rate := self.images_per_second():
            parts.append(f"{rate:.3g} images/s" if rate < 100 else f"{rate:.0f} images/s")
        parts += [f"{name} {value:.4g}" for name, value in self._metrics.items()]
        elapsed = time.monotonic() - self._began
        if self.step >= self.total:
            parts.append(f"took {clock(elapsed)}")
        elif self.step > self.start:
            parts.append(f"{clock(elapsed / (self.step - self.start) * (self.total - self.step))} left")
        return "  ".join(parts)

    def images_per_second(self) -> float:
        """Return the images per second over the last `WINDOW` seconds; 0 before the first update."""
        (t0, n0), (t1, n1) = self._recent[0], self._recent[-1]
        return (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0

    def _print(self, now: float) -> None:
        if not self.quiet:
            print(f"{self.label}: {self.text()}", file=sys.stderr, flush=True)
        self._printed_at, self._printed_step = now, self.step

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar:
            self._bar.update(self._task, text=self.text())
            self._bar.stop()
        elif self.step != self._printed_step:
            self._print(time.monotonic())


def say(words: str) -> None:
    """Print a line for the user on stderr, without secrets."""
    print(f"dvae: {scrub(words)}", file=sys.stderr, flush=True)


class CountedProgress:
    """Progress of images whose number is not known before the work begins.

    Use it as a context manager, and call it with (done, total). The first call gives the number of images that an
    earlier attempt has already done.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._bar: Progress | None = None

    def __enter__(self) -> CountedProgress:
        return self

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = Progress(self._label, total, done).__enter__()
            return
        if self._bar.step == self._bar.start:
            # Restart the clock at the first image. Otherwise the start of the processes would count as work, and the
            # rate and the remaining time would be wrong for a long while.
            self._bar.begin()
        self._bar.update(done, done - self._bar.step)

    @property
    def images(self) -> int:
        """The number of images that were processed since the first call."""
        return self._bar.step - self._bar.start if self._bar else 0

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar:
            self._bar.__exit__(kind, error, tb)


def clock(seconds: float) -> str:
    """Format seconds as m:ss, or as h:mm:ss from one hour on."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
