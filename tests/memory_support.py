"""How much memory something takes at its peak."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def status(field: str) -> int:
    """Bytes of memory of this process, by the name in /proc: VmRSS now, VmHWM at the peak, VmSize mapped."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")


def forget_peak() -> int:
    """Let the peak begin anew; returns what is in memory now."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


@contextmanager
def little_memory(limit: int = 300 * 2**20) -> Iterator[None]:
    """Fail if the context takes more than `limit` bytes at any time."""
    before = forget_peak()
    yield
    assert status("VmHWM") - before <= limit
