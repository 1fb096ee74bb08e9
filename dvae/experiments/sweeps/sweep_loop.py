"""The sweep loop, which chooses, starts, watches and records trials until `n` of them are done."""

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
"""Seconds between two checks of the trials."""


@dataclass(kw_only=True, slots=True)
class SweepToolConfig:
    """Settings of tools/sweep.py, besides the overrides for its trials."""

    sweep: str = ""
    """Name of a sweep in recipes/sweep, or path of a YAML file."""
    n: int = 8
    """Number of finished trials at which the sweep ends, 1 or more. Failed trials do not count."""
    parallel: int = 1
    """Number of trials that run at the same time, 1 or more."""
    out: str = ""
    """Folder of the sweep. Empty: runs/sweep-NAME."""
    failures: int = 3
    """Number of failed trials in one call at which the sweep gives up, 1 or more."""


class SweepStopped(MachineError):
    """The sweep received a signal to stop, and its trials have saved."""

    exit_status = TERMINATED


@dataclass
class Sweep:
    """A sweep in progress. `processes` starts and watches its trials."""

    spec: SweepSpec
    folder: SweepFolder
    overrides: list[str]
    processes: TrialProcesses
    settings: SweepToolConfig

    def __post_init__(self) -> None:
        self.trials = self.folder.trials()
        self.failed = 0

    def run(self) -> list[Trial]:
        """Run trials until `n` are done or a grid is exhausted, and return all trials.

        Raises UserError if the metric is not measured, and MachineError if too many trials fail.
        """
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
        """Start trials until `parallel` are running, or `n` are running or done.

        Trials of an earlier call that have not ended are started first. Returns False if the engine has no more trials.
        """
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
        """Record the result of a trial whose process has ended."""
        status = running.process.status
        trial.seconds = round(trial.seconds + running.seconds(), 1)
        if status == 0 or running.asked_to_stop:
            trial.metric = self.final_metric(trial)
            trial.state = TrialState.finished if status == 0 else TrialState.stopped
            if trial.metric is None:
                trial.state, trial.message = TrialState.failed, f"{self.spec.metric} was not a finite number"
        elif status != TERMINATED:  # a trial with status TERMINATED has saved after a signal and is resumed later
            trial.state, trial.message = TrialState.failed, f"exit status {status}: {running.last_line()}"
        self.folder.keep(self.trials)
        reached = "" if trial.metric is None else f", {self.spec.metric} {format_value(trial.metric)}"
        print(f"dvae: {trial.name} {trial.state.value}{reached}{trial.message and f': {trial.message}'}", flush=True)
        self.check_failures(trial)

    def final_metric(self, trial: Trial) -> float | None:
        """Return the metric at the end of a trial, or None if it is not finite.

        Raises UserError if the trial does not measure it.
        """
        found = figures.run_figures(self.folder.run(trial))
        if self.spec.metric not in found:
            raise UserError(
                f"metric {self.spec.metric!r} is not measured by {self.folder.run(trial)}: "
                f"{suggest(self.spec.metric, found)}"
            )
        return found[self.spec.metric]

    def check_failures(self, trial: Trial) -> None:
        """Count this trial if it failed. Raises MachineError if `failures` trials of this call have failed."""
        if trial.state is TrialState.failed:
            self.failed += 1
            if self.failed >= self.settings.failures:
                raise MachineError(
                    f"{self.failed} trials failed, the last of them {trial.name} with {trial.message}; see "
                    f"{self.folder.log(trial)}; run the same command again to draw other trials"
                )

    def stop_unpromising(self) -> None:
        """Signal the trials that hyperband gives up to save and stop."""
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
    """Run the sweep that `settings` describes, with `overrides` for every trial.

    Returns the sweep file, the sweep's folder and all trials. Raises UserError for invalid settings before anything is
    written, and the errors of `Sweep.run`.
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
    """Make all trials save and end when the block is left for any reason. SIGTERM raises SweepStopped in the block."""

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
    """Return the number of trials that have ended without failing."""
    return sum(trial.state in DONE_STATES for trial in trials)


def format_value(value: object) -> str:
    """Format a parameter or a metric for display, with four significant digits for floats."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
