"""Whatever a stranger sends: it is read, or ends in one line; quickly, in little memory, and nothing is started."""

from __future__ import annotations

import functools

import pytest
from hostile_runner import MEMORY, Outcome, outcomes
from hostile_shards import HOSTILE, Hostile

known = functools.cache(outcomes)  # all cases of a kind are read by one process


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: f"{case.kind}: {case.name}")
def test_it_is_read_or_ends_in_one_line(case: Hostile):
    outcome: Outcome = known(case.kind)[case.name]
    if case.sound:
        assert outcome.error == ""
        assert outcome.pixels
    else:
        kind, _, message = outcome.error.partition(": ")
        assert kind in ("UserError", "MachineError", "DamagedFile"), outcome.error or "it was read"
        assert message
        assert "\n" not in message
        assert len(message) < 2000
        assert "not enough memory" not in message
    assert outcome.seen == ()
    assert outcome.memory <= MEMORY
