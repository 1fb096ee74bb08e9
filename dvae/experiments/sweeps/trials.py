"""The folder of a sweep, and the record of its trials.

sweep.yaml         the sweep, and the overrides of all its trials
trials.json        every trial: parameters, state, metric
trial-0001/ ...    the run folder of each trial
logs/              the output of each trial
trials.csv         the table of the trials
parallel.png       the picture of the trials (parallel coordinates)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from dvae.errors import MachineError, UserError, printable_line
from dvae.utils import atomic_files
from dvae.utils.number_types import Finite, Seconds
from dvae.utils.read import DamagedFile, read_json
from dvae.utils.user_yaml import read_user_yaml


class TrialState(Enum):
    """The state of a trial."""

    running = "running"
    """Chosen but not done. It is resumed when the sweep is run again."""
    finished = "finished"
    """Trained to the end."""
    stopped = "stopped"
    """Ended early by hyperband. It counts as finished, with the metric that it had reached."""
    failed = "failed"
    """Its process failed, or its metric was not finite. It is not tried again."""


DONE_STATES = (TrialState.finished, TrialState.stopped)


@dataclass
class Trial:
    """One run of a sweep."""

    number: int
    """Number of the trial, from 1."""
    parameters: dict[str, Any]
    """Parameters that the engine chose."""
    state: TrialState = TrialState.running
    metric: Finite | None = None
    """Value of the optimized metric at the trial's end."""
    seconds: Seconds = 0.0
    """Wall-clock seconds of the trial's processes, over all attempts."""
    message: str = ""
    """Why the trial failed, such as its exit status and last line of output. Empty if it did not fail."""

    @property
    def name(self) -> str:
        return f"trial-{self.number:04d}"


class SweepFolder:
    """A sweep's folder. Every change is written to disk before the sweep continues."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / "logs"
        self._sweep = path / "sweep.yaml"
        self._trials = path / "trials.json"

    def open(self, sweep: dict[str, Any], overrides: list[str]) -> None:
        """Create the folder, or open it to resume the sweep.

        Raises UserError if it holds another sweep or something else, or cannot be written.
        """
        kept = {"sweep": sweep, "overrides": overrides}
        if self._sweep.exists():
            if self._kept() != kept:
                raise UserError(f"out={self.path} holds a sweep of another file or other overrides: use another out=")
            return
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"out={self.path} exists and is not a sweep: use another out=, or remove it")
        try:
            self.logs.mkdir(parents=True)
            atomic_files.write_text(self._sweep, yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))
        except OSError as error:
            raise UserError(f"out={self.path} cannot be written ({error.strerror}): use another out=") from None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock the folder against a second sweep. The lock is released when this process ends, even if it is killed."""
        refusal = UserError(f"out={self.path} is in use by another sweep: wait, or use another out=")
        with atomic_files.locked(self.path / ".lock", refusal):
            atomic_files.remove_leftovers(self.path)
            yield

    def _kept(self) -> dict[str, Any]:
        """Return the contents of sweep.yaml. Raises MachineError if it is damaged."""
        try:
            return read_user_yaml(self._sweep, "yaml")
        except DamagedFile as error:
            raise MachineError(f"{error}: this sweep's record is damaged; use another out=") from None

    def trials(self) -> list[Trial]:
        """Read all trials, in the order of their numbers. Raises MachineError if trials.json is damaged."""
        if not self._trials.exists():
            return []
        try:
            trials = [replace(one, message=printable_line(one.message)) for one in read_json(self._trials, list[Trial])]
            if [trial.number for trial in trials] != list(range(1, len(trials) + 1)):
                raise DamagedFile(self._trials, "does not hold the trials 1, 2, ...")
        except DamagedFile as error:
            raise MachineError(
                f"{self._trials}: is damaged ({error.reason}); the trials' run folders beside it are intact"
            ) from None
        return trials

    def keep(self, trials: list[Trial]) -> None:
        """Write all trials to trials.json, atomically."""
        atomic_files.write_json(self._trials, [asdict(trial) | {"state": trial.state.value} for trial in trials])

    def run(self, trial: Trial) -> Path:
        """Return the trial's run folder."""
        return self.path / trial.name

    def log(self, trial: Trial) -> Path:
        """Return the file for the trial's output."""
        return self.logs / f"{trial.name}.log"
