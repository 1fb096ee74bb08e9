"""The one line that says why a job ended."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from dvae.errors import MachineError, Stopped, UserError
from dvae.runs.exit_status import LOST, RankExit, last_step, raise_for


def end(number: int, status: int, message: str = "", retryable: bool = True) -> RankExit:
    return RankExit(number=number, status=status, message=message, retryable=retryable)


def test_the_cause_is_named_and_not_who_lost_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "encoder", "step": 12}\n{"stage": "enc')
    lost = end(0, LOST, "rank 0: lost the connection to another rank")
    for other, line in (
        (end(1, -9), "rank 1 ended by SIGKILL after encoder step 12; the other ranks were stopped: the same"),
        (end(1, 1, "disk full"), "rank 1 failed with exit status 1 after encoder step 12: disk full"),
    ):
        with pytest.raises(MachineError, match=line):
            raise_for(tmp_path, [lost, other], [])
    with pytest.raises(UserError, match=r"^mend this$"):
        raise_for(tmp_path, [lost, end(1, 2, "mend this")], [])
    with pytest.raises(Stopped, match="ended by SIGTERM") as caught:
        raise_for(tmp_path, [end(0, -15), end(1, -15)], [signal.SIGTERM])
    assert (caught.value.exit_status, caught.value.stop_reason) == (143, "SIGTERM")
    with pytest.raises(KeyboardInterrupt):
        raise_for(tmp_path, [end(0, 130)], [signal.SIGINT])
    assert last_step(tmp_path / "empty") == "no step on record"


@pytest.mark.parametrize("retryable", [True, False])
def test_what_would_fail_again_says_so(tmp_path: Path, retryable: bool) -> None:
    with pytest.raises(MachineError, match="no step on record: not finite") as caught:
        raise_for(tmp_path, [end(1, 1, "not finite", retryable)], [])
    assert caught.value.retryable is retryable
