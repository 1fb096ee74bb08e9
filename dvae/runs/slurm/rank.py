"""One rank of a job on SLURM: srun starts `python -m dvae.runs.slurm.rank RUN [STAGE ...]` once per task.

The rank reports its start and its end through the supervisor's store. Each rank writes its output to a separate log.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any

from dvae.errors import Stopped, summarize
from dvae.utils.secrets import guard_streams

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that ask a rank to save and end."""
STARTED_KEY, ENDED_KEY = "started", "ended"
"""Prefixes of keys in the store. A space and the rank's number follow."""


def main(words: list[str]) -> int:
    """Run one rank of the job, and return its exit status. `words` are the run folder and the stages."""
    guard_streams()
    # Install handlers before the imports, which take seconds: by default, each of these signals kills the process.
    handle_signals(exit_on_signal)
    os.environ.update(torch_environment(os.environ))
    import torch.distributed as dist

    where, port, number = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), os.environ["RANK"]
    store = dist.TCPStore(where, port, is_master=False, timeout=timedelta(minutes=5))
    host = {"host": os.environ.get("SLURMD_NODENAME", "?"), "pid": os.getpid(), "step": os.environ["SLURM_STEP_ID"]}
    store.set(f"{STARTED_KEY} {number}", json.dumps(host))
    handle_signals(stop_on_signal)
    end = run(words, store)
    store.set(f"{ENDED_KEY} {number}", json.dumps(end))
    return int(end["status"])


def torch_environment(given: Any) -> dict[str, str]:
    """Return the environment variables of torch.distributed, from the variables of srun.

    OMP_NUM_THREADS is set to the number of CPUs of the task, unless the user has set it.
    """
    theirs = {
        "RANK": given["SLURM_PROCID"], "WORLD_SIZE": given["SLURM_NTASKS"], "LOCAL_RANK": given["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": given["SLURM_STEP_TASKS_PER_NODE"].partition("(")[0].partition(",")[0],
    }  # fmt: skip
    threads = given.get("SLURM_CPUS_PER_TASK", "1")
    return theirs | ({} if "OMP_NUM_THREADS" in given else {"OMP_NUM_THREADS": threads})


def run(words: list[str], store: Any) -> dict[str, Any]:
    """Run the job. Returns the end of the rank for the supervisor: the fields of a RankExit other than the number."""
    from dvae.runs.exit_status import HANGS
    from dvae.runs.job import RunJob
    from dvae.training.resilience import watchdog

    def on_hang(message: str, speaks: bool) -> None:
        store.set(f"{ENDED_KEY} {os.environ['RANK']}", json.dumps({"status": HANGS, "message": message}))
        watchdog.exit_now(HANGS)

    watchdog.on_hang = on_hang
    try:
        RunJob(words[0], tuple(words[1:]))()
    except BaseException as error:  # noqa: BLE001 every error must reach the supervisor
        message, status = summarize(error)
        print(f"dvae: {message}", file=sys.stderr, flush=True)
        return {
            "status": status, "message": message,
            "stop_reason": getattr(error, "stop_reason", ""), "retryable": getattr(error, "retryable", True),
        }  # fmt: skip
    return {"status": 0}


def handle_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, handler)


def exit_on_signal(number: int, frame: FrameType | None) -> None:
    """End the process on a signal that comes before the store is connected. srun reports the exit status."""
    os._exit(128 + number)


def stop_on_signal(number: int, frame: FrameType | None) -> None:
    """Raise Stopped on a signal outside training, where nothing more can be saved."""
    name = signal.Signals(number).name
    raise Stopped(f"stopped outside training ({name}): the same command again resumes", name)


if __name__ == "__main__":
    faulthandler.enable()
    warnings.filterwarnings("ignore", category=FutureWarning)
    sys.exit(main(sys.argv[1:]))
