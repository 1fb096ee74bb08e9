"""Names of trainings: those of a stage with several rounds are NAME-32, NAME-16, and so on."""

from __future__ import annotations

TRAINING_PREFIX = "train_"
"""Begins the name of a field of a run's settings that says how a stage is trained."""


def stage_of(training: str) -> str:
    """The stage that a training belongs to: "sharpen" of "sharpen-32"."""
    return training.partition("-")[0]


def training_field(training: str) -> str:
    """The field of a run's settings that holds those of a training: "train_sharpen" of "sharpen-32"."""
    return f"{TRAINING_PREFIX}{stage_of(training)}"
