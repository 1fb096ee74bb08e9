"""The folder of a sweep, and what it remembers.

sweep.yaml         the sweep, and the overrides that all its trials were started with
trials.json        every trial that was drawn: parameters, state, metric
trial-0001/ ...    their run folders
logs/              the output of each of them
trials.csv parallel.png
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
    """What has become of a trial."""

    running = "running"
    """Drawn, and not at its end: it is taken up again when the sweep is."""
    finished = "finished"
    stopped = "stopped"
    """Ended early by hyperband; counts as finished, with the metric that it had reached."""
    failed = "failed"
    """Its process failed; it is not tried again."""


DONE_STATES = (TrialState.finished, TrialState.stopped)


@dataclass
class Trial:
    """One run of a sweep."""

    number: int
    """From 1."""
    parameters: dict[str, Any]
    """What the engine chose."""
    state: TrialState = TrialState.running
    metric: Finite | None = None
    """What the sweep optimizes, at the trial's end."""
    seconds: Seconds = 0.0
    """Time that its processes took, over all attempts."""
    message: str = ""
    """For a failed one: exit status and last line."""

    @property
    def name(self) -> str:
        return f"trial-{self.number:04d}"


class SweepFolder:
    """A sweep's folder. Every change is on the disk before the next thing is done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / "logs"
        self._sweep = path / "sweep.yaml"
        self._trials = path / "trials.json"

    def open(self, sweep: dict[str, Any], overrides: list[str]) -> None:
        """Make the folder, or take it up. Raises UserError where it holds something else, or another sweep."""
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
        """Hold the folder against a second sweep; the hold ends with this process, however it ends."""
        refusal = UserError(f"out={self.path} is in use by another sweep: wait, or use another out=")
        with atomic_files.locked(self.path / ".lock", refusal):
            atomic_files.remove_leftovers(self.path)
            yield

    def _kept(self) -> dict[str, Any]:
        """What sweep.yaml holds. Raises MachineError if it is damaged."""
        try:
            return read_user_yaml(self._sweep, "yaml")
        except DamagedFile as error:
            raise MachineError(f"{error}: this sweep's record is damaged; use another out=") from None

    def trials(self) -> list[Trial]:
        """All trials, in the order in which they were drawn. Raises MachineError if their file is damaged."""
        if not self._trials.exists():
            return []
        try:
            trials = [replace(one, message=printable_line(one.message)) for one in read_json(self._trials, list[Trial])]
            if [trial.number for trial in trials] != list(range(1, len(trials) + 1)):
                raise DamagedFile(self._trials, "does not hold the trials 1, 2, ...")
        except DamagedFile as error:
            raise MachineError(
                f"{self._trials}: is damaged ({error.reason}); the trials' run folders beside it are whole"
            ) from None
        return trials

    def keep(self, trials: list[Trial]) -> None:
        """Write all trials."""
        atomic_files.write_json(self._trials, [asdict(trial) | {"state": trial.state.value} for trial in trials])

    def run(self, trial: Trial) -> Path:
        """The trial's run folder."""
        return self.path / trial.name

    def log(self, trial: Trial) -> Path:
        return self.logs / f"{trial.name}.log"
