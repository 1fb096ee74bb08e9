"""Stand-ins for a rank, each a way to end. Imports nothing heavy, because processes of their own import it."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from dvae.errors import UserError
from dvae.runs.exit_status import HANGS
from dvae.utils.child_processes import ChildFailure

Send = Callable[[Any], None]


def deaf(send: Send) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def fails(send: Send) -> None:
    raise UserError("lr=0: use more")


def hangs(send: Send) -> None:
    send(ChildFailure("rank 0 stands still", HANGS))
    os._exit(HANGS)


def stands_still(send: Send) -> None:
    faulthandler.register(signal.SIGQUIT, chain=True)
    send("ready")
    time.sleep(60)
