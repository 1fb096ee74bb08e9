"""The states of a run's stages, read from the run folder."""

from __future__ import annotations

from enum import Enum

from dvae.runs.folder import Run
from dvae.stages.base import Stage, TrainStage
from dvae.training.resilience.checkpoint import Checkpoints


class StageState(Enum):
    """The state of a stage, as a dry run prints it."""

    to_do = "to do"
    begun = "begun"
    """The stage trains, and has a checkpoint from which it can resume."""
    stale = "stale"
    """The stage was finished, but its settings have changed since. It runs again."""
    finished = "finished"


def stage_state(run: Run, stage: Stage) -> StageState:
    """Return the state of a stage of a run. The run folder need not exist."""
    record = run.records().get(stage.name)
    if record is not None:
        return StageState.finished if stage.is_current(record) else StageState.stale
    return StageState.begun if saved_steps(run, stage) else StageState.to_do


def saved_steps(run: Run, stage: Stage) -> dict[str, int]:
    """Return the newest step that has a checkpoint, by training. Empty if there is no checkpoint."""
    trainings = stage.trainings() if isinstance(stage, TrainStage) else []
    steps = {name: Checkpoints(run.checkpoints(name), keep=0).steps() for name in trainings}
    return {name: found[-1] for name, found in steps.items() if found}
