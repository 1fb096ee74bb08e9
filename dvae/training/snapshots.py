"""Snapshots: averages of the weights at some steps of a stage, from which others are made afterwards (posthoc.py)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dvae import files
from dvae.settings import EmaProfile, TrainingConfig
from dvae.training import ranks
from dvae.training.ema import MAIN, Average, averages
from dvae.weights import save_weights

if TYPE_CHECKING:
    from dvae.training.engine import Engine

LABEL = {EmaProfile.power: "width", EmaProfile.constant: "decay"}
"""What a file's name calls the number of a profile."""
NAME = re.compile(r"step-(\d+)-(width|decay)-(\d+(?:\.\d+)?(?:e-\d+)?)\.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """One file: one average at one step."""

    step: int
    average: Average
    path: Path

    @staticmethod
    def at(folder: Path, step: int, average: Average) -> Snapshot:
        name = f"step-{step:08d}-{LABEL[average.profile]}-{average.value}.safetensors"
        return Snapshot(step, average, folder / name)

    @staticmethod
    def of(path: Path) -> Snapshot | None:
        """The snapshot that a file's name tells of; None where it tells of none."""
        found = NAME.fullmatch(path.name)
        if found is None:
            return None
        step, label, value = found.groups()
        profile = next(profile for profile, known in LABEL.items() if known == label)
        return Snapshot(int(step), Average(profile, float(value)), path)


def list_snapshots(folder: Path) -> list[Snapshot]:
    """All snapshots in a stage's folder, by step."""
    found = [Snapshot.of(path) for path in sorted(folder.glob("step-*"))]
    return [snapshot for snapshot in found if snapshot is not None]


class Snapshots:
    """The snapshots of one stage while it is trained: folder/step-00001000-width-0.05.safetensors, ..."""

    def __init__(self, folder: Path, training: TrainingConfig) -> None:
        self.folder = folder
        self.every = training.ema.snapshot_every
        self.last = training.steps
        self.averages = {
            name: average
            for name, average in averages(training.ema).items()
            if name != MAIN or average.profile is EmaProfile.power
        }

    def take(self, step: int, engine: Engine) -> None:
        """Where one is due, write a snapshot of each average; every rank takes part, rank 0 writes.

        Raises MachineError where one could not be written.
        """
        if not self.every or (step % self.every and step != self.last):
            return
        parameters = {name for name, _ in engine.module.named_parameters()}
        for name, average in self.averages.items():
            state = engine.averaged(name)
            ranks.on_first(save_weights, Snapshot.at(self.folder, step, average).path, halved(state, parameters))

    def drop_after(self, step: int) -> None:
        """Remove snapshots beyond `step`: their steps are about to be taken again."""
        files.remove_leftovers(self.folder)
        for snapshot in list_snapshots(self.folder):
            if snapshot.step > step:
                snapshot.path.unlink()


def halved(state: dict[str, torch.Tensor], parameters: set[str]) -> dict[str, torch.Tensor]:
    """`state` with its parameters in fp16, which rounds by 2^-12 at most; those out of its range are left as they are.

    bf16 would round by 2^-9, more than most fits are wrong by.
    """
    limit = torch.finfo(torch.float16).max
    return {
        name: value.half() if name in parameters and value.abs().max() < limit else value
        for name, value in state.items()
    }
