"""`tools/launch.py --multirun`: one run after the other for every combination, `seed=1,2,3` as Hydra understands it."""

from __future__ import annotations

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from dvae.config import compose as configuration
from dvae.errors import MachineError, UserError, fold
from dvae.experiments.launch_program import launch

FLAGS = ("--multirun", "-m")


def expand(overrides: list[str]) -> list[list[str]]:
    """The overrides of each run. Raises UserError for an override that Hydra does not understand."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    except HydraException as error:
        raise UserError(f"--multirun: {fold(error)}") from None
    return [list(job) for job in jobs]


def with_folders(jobs: list[list[str]]) -> list[list[str]]:
    """Give each run a folder of its own: 0, 1, ... in that which they would share, as Hydra numbers them.

    All are composed and checked first, so that the last one's mistake is found before the first one is trained.
    """
    folders = [configuration.to_run_config(configuration.compose("train", job)).run for job in jobs]
    if len(set(folders)) == len(jobs):
        return jobs
    return [
        [*(word for word in job if not word.startswith("run=")), f"run={folder}/{number}"]
        for number, (job, folder) in enumerate(zip(jobs, folders, strict=True))
    ]


def run(overrides: list[str]) -> None:
    """Launch the runs one after the other, each in a process of its own. Raises MachineError at the first that fails,
    with its exit status; the same command again passes over those that are finished."""
    jobs = with_folders(expand(overrides))
    for number, job in enumerate(jobs):
        print(f"dvae: run {number + 1} of {len(jobs)}: {' '.join(job)}", flush=True)
        status = launch(job)
        if status:
            error = MachineError(f"run {number + 1} of {len(jobs)} ended with exit status {status}: {' '.join(job)}")
            error.exit_status = status if status > 0 else 128 - status
            raise error
