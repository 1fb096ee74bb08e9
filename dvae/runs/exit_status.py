"""Turn the exits of a job's ranks into the error that ends the job. This module imports no large packages."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dvae.errors import MachineError, Stopped, UserError
from dvae.runs.attempts import INTERRUPTED, TERMINATED
from dvae.tracking.metrics_log import MetricsLog

LOST, HANGS = 75, 76
"""Exit statuses of a rank that ends because another rank is lost or hangs. `run_command` has all others."""
GRACE = 5.0
"""Seconds that the other ranks have to end by themselves after one has failed. Then they are killed."""


@dataclass(frozen=True, kw_only=True)
class RankExit:
    """The end of one rank."""

    number: int
    """Number of the rank."""
    status: int
    """Exit status. If a signal killed the rank, minus the signal number, as in subprocess."""
    message: str = ""
    """Reason of the failure, in one line."""
    stop_reason: str = ""
    """The signal or limit that stopped the rank, if it was asked to stop (dvae/training/resilience/stopping.py)."""
    retryable: bool = True
    """Whether a retry without changes may succeed."""

    @property
    def failed(self) -> bool:
        """Whether the rank failed, that is, it neither finished nor was asked to stop."""
        return self.status not in (0, TERMINATED)


def raise_for(folder: Path, failed: list[RankExit], forwarded: Sequence[int]) -> None:
    """Raise the error that ended the job. It comes from the first failed rank that did not just lose another rank.

    Args:
        folder: The run folder.
        failed: The ranks that failed, in the order in which they ended.
        forwarded: Signals that were passed on to the ranks. A rank that such a signal killed was asked to stop.

    Raises:
        UserError: The user can fix the failure.
        KeyboardInterrupt: The rank was interrupted by Ctrl-C.
        Stopped: The rank was killed by a forwarded signal.
        MachineError: Any other failure. The message names the rank, its exit status or signal, and the last step.
    """
    rank = next((rank for rank in failed if rank.status != LOST), failed[0])
    if -rank.status in forwarded:
        name = signal.Signals(-rank.status).name
        error = Stopped(f"ended by {name}: the same command again resumes", name)
        error.exit_status = 128 - rank.status
        raise error
    if rank.status == UserError.exit_status:
        raise UserError(rank.message)
    if rank.status == INTERRUPTED:
        raise KeyboardInterrupt
    if rank.status == HANGS:
        raise MachineError(rank.message)
    killed = rank.status < 0
    how = f"ended by {signal.Signals(-rank.status).name}" if killed else f"failed with exit status {rank.status}"
    why = f": {rank.message}" if rank.message else "; the other ranks were stopped: the same command again resumes"
    failure = MachineError(f"rank {rank.number} {how} after {last_step(folder)}{why}")
    failure.retryable = rank.retryable
    raise failure


def last_step(folder: Path) -> str:
    """Return the stage and step of the newest row of metrics, as text."""
    row = MetricsLog(folder / "metrics.jsonl").newest()
    return f"{row['stage']} step {row['step']}" if row else "no step on record"
