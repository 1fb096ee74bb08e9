"""`tools/launch.py --multirun`: train one run for every combination of values, such as `seed=1,2,3` in Hydra's syntax.

The runs are trained one after the other.
"""

from __future__ import annotations

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from dvae.config import compose as configuration
from dvae.errors import MachineError, UserError, fold
from dvae.experiments.launch_program import launch

FLAGS = ("--multirun", "-m")


def expand(overrides: list[str]) -> list[list[str]]:
    """Return the overrides of each run. Raises UserError if Hydra cannot parse an override."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    except HydraException as error:
        raise UserError(f"--multirun: {fold(error)}") from None
    return [list(job) for job in jobs]


def with_folders(jobs: list[list[str]]) -> list[list[str]]:
    """Give each run its own folder.

    If runs would share a folder, all runs get folders numbered 0, 1, ... inside it, as in Hydra. The settings of all
    runs are composed and checked first. An error in the last run is therefore found before the first run is trained.
    """
    folders = [configuration.to_run_config(configuration.compose("train", job)).run for job in jobs]
    if len(set(folders)) == len(jobs):
        return jobs
    return [
        [*(word for word in job if not word.startswith("run=")), f"run={folder}/{number}"]
        for number, (job, folder) in enumerate(zip(jobs, folders, strict=True))
    ]


def run(overrides: list[str]) -> None:
    """Train the runs one after the other, each in a separate process.

    Raises MachineError with the exit status of the first run that fails. The same command, given again, skips finished
    runs.
    """
    jobs = with_folders(expand(overrides))
    for number, job in enumerate(jobs):
        print(f"dvae: run {number + 1} of {len(jobs)}: {' '.join(job)}", flush=True)
        status = launch(job)
        if status:
            error = MachineError(f"run {number + 1} of {len(jobs)} ended with exit status {status}: {' '.join(job)}")
            # As in a shell, a process that signal N ended has exit status 128 + N.
            error.exit_status = status if status > 0 else 128 - status
            raise error
