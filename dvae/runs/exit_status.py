"""How a job ended, in one line, from how its ranks did. Imports nothing heavy."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dvae.errors import MachineError, Stopped, UserError
from dvae.runs.attempts import INTERRUPTED, TERMINATED
from dvae.tracking.metrics_log import MetricsLog

LOST, HANGS = 75, 76
"""Exit statuses of a rank, besides those of `run_command`: another rank is gone, or hangs."""
GRACE = 5.0
"""Seconds that the other ranks have to end by themselves once one has failed; then they are killed."""


@dataclass(frozen=True, kw_only=True)
class RankExit:
    """How one rank ended."""

    number: int
    """Its rank."""
    status: int
    """Exit status; below 0: the signal that killed it, as in subprocess."""
    message: str = ""
    """Why it failed, in one line."""
    stop_reason: str = ""
    """Of one that was asked to stop and has saved: what asked (dvae/training/resilience/stopping.py)."""
    retryable: bool = True
    """Whether the same might work another time."""

    @property
    def failed(self) -> bool:
        """Whether it neither finished nor was asked to stop."""
        return self.status not in (0, TERMINATED)


def raise_for(folder: Path, failed: list[RankExit], forwarded: Sequence[int]) -> None:
    """Raise what ended the job: the first of the ranks in `failed` that did not merely lose another.

    `forwarded` are the signals that were passed on to the ranks: a rank that died of one was asked to end.

    Raises UserError if the user can fix it, KeyboardInterrupt, Stopped, or else MachineError with the rank, how it
    ended and its last step.
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
    """Where the run was, by its last row of metrics."""
    row = MetricsLog(folder / "metrics.jsonl").newest()
    return f"{row['stage']} step {row['step']}" if row else "no step on record"
