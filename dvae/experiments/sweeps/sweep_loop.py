"""The sweep: trials are drawn, started, watched and entered, until `n` of them are at their end."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from dvae.errors import MachineError, UserError, suggest
from dvae.experiments.sweeps import sweep_engine
from dvae.experiments.sweeps import sweep_spec as spec
from dvae.experiments.sweeps.sweep_spec import SweepSpec
from dvae.experiments.sweeps.trial_processes import RunningTrial, TrialProcesses
from dvae.experiments.sweeps.trials import DONE_STATES, SweepFolder, Trial, TrialState
from dvae.registry.launchers.base import launcher_of
from dvae.runs.attempts import TERMINATED
from dvae.tracking import figures
from dvae.utils.child_processes import handling

POLL_SECONDS = 1.0
"""Seconds between two looks at the trials."""


@dataclass(kw_only=True, slots=True)
class SweepToolConfig:
    """What tools/sweep.py takes, besides overrides for its trials."""

    sweep: str = ""
    """A sweep of recipes/sweep, or a YAML file."""
    n: int = 8
    """Trials that the sweep shall have at its end; those that failed are not counted."""
    parallel: int = 1
    """Trials at a time."""
    out: str = ""
    """Folder of the sweep; by default runs/sweep-NAME."""
    failures: int = 3
    """Trials that may fail, in one call, before it gives up."""


class SweepStopped(MachineError):
    """The sweep was asked to stop, and its trials have saved."""

    exit_status = TERMINATED


@dataclass
class Sweep:
    """A sweep in progress. `processes` is what starts and watches its trials."""

    spec: SweepSpec
    folder: SweepFolder
    overrides: list[str]
    processes: TrialProcesses
    settings: SweepToolConfig

    def __post_init__(self) -> None:
        self.trials = self.folder.trials()
        self.failed = 0

    def run(self) -> list[Trial]:
        """Returns all trials once `n` are at their end, or a grid has no more. Raises UserError for a metric that
        is not measured, MachineError where too many trials fail."""
        exhausted = False
        while True:
            for number, running in self.processes.ended().items():
                self.record_end(self.trials[number - 1], running)
            exhausted = exhausted or not self.start_trials()
            if not self.processes.running:
                return self.trials
            self.stop_unpromising()
            time.sleep(POLL_SECONDS)

    def start_trials(self) -> bool:
        """Start trials until `parallel` run or `n` are on their way; False where the engine has no more."""
        while len(self.processes.running) < self.settings.parallel:
            waiting = [
                t for t in self.trials if t.state is TrialState.running and t.number not in self.processes.running
            ]
            if waiting:
                self.start(waiting[0])
            elif count_done(self.trials) + len(self.processes.running) >= self.settings.n:
                return True
            else:
                parameters = sweep_engine.propose(self.spec.sweep, self.trials)
                if parameters is None:
                    return False
                self.trials.append(Trial(len(self.trials) + 1, parameters))
                self.folder.keep(self.trials)
        return True

    def start(self, trial: Trial) -> None:
        overrides = [*self.overrides, f"run={self.folder.run(trial)}"]
        self.processes.start(trial.number, self.spec.command(trial.parameters, overrides), self.folder.log(trial))
        chosen = " ".join(f"{name}={format_value(value)}" for name, value in trial.parameters.items())
        print(f"dvae: {trial.name} {chosen}", flush=True)

    def record_end(self, trial: Trial, running: RunningTrial) -> None:
        """Enter what has become of a trial whose process has ended."""
        status = running.process.status
        trial.seconds = round(trial.seconds + running.seconds(), 1)
        if status == 0 or running.asked_to_stop:
            trial.metric = self.final_metric(trial)
            trial.state = TrialState.finished if status == 0 else TrialState.stopped
            if trial.metric is None:
                trial.state, trial.message = TrialState.failed, f"{self.spec.metric} was not a finite number"
        elif status != TERMINATED:  # one that somebody else asked to stop has saved, and is taken up again
            trial.state, trial.message = TrialState.failed, f"exit status {status}: {running.last_line()}"
        self.folder.keep(self.trials)
        reached = "" if trial.metric is None else f", {self.spec.metric} {format_value(trial.metric)}"
        print(f"dvae: {trial.name} {trial.state.value}{reached}{trial.message and f': {trial.message}'}", flush=True)
        self.check_failures(trial)

    def final_metric(self, trial: Trial) -> float | None:
        """The metric at the end of a trial; None where it is not finite. Raises UserError where there is no such."""
        found = figures.run_figures(self.folder.run(trial))
        if self.spec.metric not in found:
            raise UserError(
                f"metric {self.spec.metric!r} is not measured by {self.folder.run(trial)}: "
                f"{suggest(self.spec.metric, found)}"
            )
        return found[self.spec.metric]

    def check_failures(self, trial: Trial) -> None:
        """Raise MachineError where this trial's failure is one too many."""
        if trial.state is TrialState.failed:
            self.failed += 1
            if self.failed >= self.settings.failures:
                raise MachineError(
                    f"{self.failed} trials failed, the last of them {trial.name} with {trial.message}; see "
                    f"{self.folder.log(trial)}; the same command again draws others"
                )

    def stop_unpromising(self) -> None:
        """Ask those to stop that hyperband gives up."""
        if "early_terminate" not in self.spec.sweep:
            return
        values = {
            trial.number: figures.metric_history(self.folder.run(trial), self.spec.metric)
            for trial in self.trials
            if trial.state is not TrialState.failed
        }
        for number in sweep_engine.trials_to_stop(self.spec.sweep, self.trials, values):
            if number in self.processes.running:
                self.processes.stop(number)


def sweep(overrides: list[str], settings: SweepToolConfig) -> tuple[SweepSpec, SweepFolder, list[Trial]]:
    """Run the sweep that `settings` names; every trial gets the `overrides`.

    Raises UserError before anything is written.
    """
    found = spec.load(settings.sweep)
    for name in ("n", "parallel", "failures"):
        if getattr(settings, name) < 1:
            raise UserError(f"{name}={getattr(settings, name)}: use 1 or more")
    launcher = launcher_of(spec.check_first_trial(found, overrides).launcher)
    if launcher.elsewhere:
        overrides = [*overrides, "launcher.wait=true"]
    folder = SweepFolder(Path(settings.out or f"runs/sweep-{found.name}"))
    folder.open(found.sweep, overrides)
    processes = TrialProcesses(settings.parallel, shared=not launcher.elsewhere)
    with folder.held(), stopping_trials(processes):
        current = Sweep(found, folder, overrides, processes, settings)
        if count_done(current.trials) > settings.n:
            raise UserError(
                f"n={settings.n}: {folder.path} holds {count_done(current.trials)} finished trials already: "
                f"use n={count_done(current.trials)} or more, or another out="
            )
        return found, folder, current.run()


@contextmanager
def stopping_trials(processes: TrialProcesses) -> Iterator[None]:
    """Have the trials save and end when the block is left, whatever ends it; SIGTERM ends it."""

    def ask(number: int, frame: FrameType | None) -> None:
        raise SweepStopped(
            f"stopped ({signal.Signals(number).name}), its trials have saved: the same command again resumes"
        )

    with handling([signal.SIGTERM], ask):
        try:
            yield
        finally:
            processes.stop_all()


def count_done(trials: Sequence[Trial]) -> int:
    """How many trials are at their end, and did not fail."""
    return sum(trial.state in DONE_STATES for trial in trials)


def format_value(value: object) -> str:
    """A parameter or a metric, for people."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
