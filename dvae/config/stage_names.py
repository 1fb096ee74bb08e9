"""Names of trainings: those of a stage with several rounds are distil-32, distil-16, and so on."""

from __future__ import annotations


def stage_of(training: str) -> str:
    """The stage that a training belongs to: "distil" of "distil-32"."""
    return training.partition("-")[0]


def settings_of(training: str) -> str:
    """The field of a run's config that holds a training's settings: "train_distil" of "distil-32"."""
    return f"train_{stage_of(training)}"
