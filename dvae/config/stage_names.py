"""Names of trainings. A training has the name of its stage, or NAME-32, NAME-16, ... if the stage has rounds."""

from __future__ import annotations

TRAINING_PREFIX = "train_"
"""Prefix of the fields of a run's settings that hold training settings: the field train_NAME is for the stage NAME."""


def stage_of(training: str) -> str:
    """Return the stage of a training: "sharpen" for "sharpen-32"."""
    return training.partition("-")[0]


def training_field(training: str) -> str:
    """Return the field of a run's settings that holds a training's settings: "train_sharpen" for "sharpen-32"."""
    return f"{TRAINING_PREFIX}{stage_of(training)}"
