"""What state each stage of a run is in, by its folder."""

from __future__ import annotations

from enum import Enum

from dvae.runs.folder import Run
from dvae.stages.base import Stage, TrainStage
from dvae.training.resilience.checkpoint import Checkpoints


class StageState(Enum):
    """The state of a stage, as a dry run tells it."""

    to_do = "to do"
    begun = "begun"
    """Training that has a checkpoint to go on from."""
    stale = "stale"
    """It was finished, and its settings have changed since: it is run again."""
    finished = "finished"


def stage_state(run: Run, stage: Stage) -> StageState:
    """The state of a stage in a run's folder, which need not exist."""
    record = run.records().get(stage.name)
    if record is not None:
        return StageState.finished if stage.is_current(record) else StageState.stale
    return StageState.begun if saved_steps(run, stage) else StageState.to_do


def saved_steps(run: Run, stage: Stage) -> dict[str, int]:
    """The newest step that has a checkpoint, by training; empty if the stage has not begun, or does not train."""
    trainings = stage.trainings() if isinstance(stage, TrainStage) else []
    steps = {name: Checkpoints(run.checkpoints(name), keep=0).steps() for name in trainings}
    return {name: found[-1] for name, found in steps.items() if found}
