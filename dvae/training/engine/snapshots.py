"""Snapshots: averages of the weights at some steps of a stage, from which others are made afterwards (posthoc.py).

A stage's folder holds one weights file per snapshot, and hashes.json with the hash of each: {file name: sha256}.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dvae.config.schema import WIDTHS, EmaProfile, TrainingConfig
from dvae.errors import MachineError
from dvae.training.engine.ema import MAIN, Average, averages
from dvae.training.resilience import ranks
from dvae.utils import atomic_files
from dvae.utils.read import MIB, DamagedFile, read_json, read_weights_header
from dvae.utils.weights import State, check_weights, load_weights, refuse_nonfinite, save_weights, without_numbers

if TYPE_CHECKING:
    from dvae.training.engine.deepspeed_engine import Engine

LABEL = {EmaProfile.power: "width", EmaProfile.constant: "decay"}
"""What a file's name calls the number of a profile."""
NAME = re.compile(r"step-([0-9]{8,10})-(width|decay)-([0-9]{1,20}(?:\.[0-9]{1,30})?(?:e-[0-9]{1,3})?)\.safetensors")
LAST_STEP = 10**9
"""The highest step that a snapshot may have."""
HASHES = "hashes.json"
HASHES_LIMIT = 32 * MIB
"""Bytes of hashes.json, at most; one snapshot takes about 120."""


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
        """The snapshot that a file's name tells of.

        Returns None if dvae would not give that name: for a step, a width or a decay that no training has, and for
        another spelling of a number, because two files could then claim to be the same snapshot.
        """
        found = NAME.fullmatch(path.name)
        if found is None:
            return None
        step, label, value = int(found[1]), found[2], float(found[3])
        profile = next(profile for profile, known in LABEL.items() if known == label)
        known = WIDTHS[0] <= value <= WIDTHS[1] if profile is EmaProfile.power else 0.0 <= value < 1.0
        snapshot = Snapshot.at(path.parent, step, Average(profile, value))
        return snapshot if known and 1 <= step <= LAST_STEP and snapshot.path == path else None

    def load(self, module: torch.nn.Module) -> State:
        """The tensors of the file, which fit `module`; the module may be on the meta device.

        Raises MachineError if the file is damaged, or differs from its hash; UserError if its tensors do not fit, or
        hold NaN or infinity.
        """
        header = read_weights_header(self.path)  # before the hash: the header tells how large the file may be
        known = read_hashes(self.path.parent).get(self.path.name)
        if known is None:
            raise MachineError(
                f"{self.path} has no hash in {HASHES}, as after a training that was killed: run the same training "
                "again, or remove the file"
            )
        if atomic_files.sha256(self.path) != known:
            raise MachineError(
                f"{self.path} does not match its hash in {HASHES}: the file is damaged: put back a copy, or remove it"
            )
        check_weights(module, without_numbers(header), str(self.path))
        state = load_weights(self.path)
        refuse_nonfinite(state, str(self.path))
        return state


def read_hashes(folder: Path) -> dict[str, str]:
    """The hashes of the snapshots in a stage's folder, by file name. Raises DamagedFile."""
    path = folder / HASHES
    return read_json(path, dict[str, str], HASHES_LIMIT) if path.exists() else {}


def list_snapshots(folder: Path) -> list[Snapshot]:
    """All snapshots in a stage's folder, by step."""
    found = [Snapshot.of(path) for path in sorted(folder.glob("step-*"))]
    return [snapshot for snapshot in found if snapshot is not None]


class Snapshots:
    """The snapshots of one stage while it is trained: folder/step-00001000-width-0.05.safetensors, ...

    A process that is killed between a snapshot and its hash leaves a file without one. The checkpoint of that step is
    written later, so a resumed training begins before the step: it removes the file, and takes the snapshot again.
    """

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
            ranks.on_rank_zero(self._write, Snapshot.at(self.folder, step, average).path, halved(state, parameters))

    def _write(self, path: Path, state: State) -> None:
        save_weights(path, state)
        self._write_hashes(read_hashes(self.folder) | {path.name: atomic_files.sha256(path)})

    def _write_hashes(self, hashes: dict[str, str]) -> None:
        atomic_files.write_json(self.folder / HASHES, hashes)

    def drop_after(self, step: int) -> None:
        """Remove snapshots beyond `step`, and their hashes: their steps are about to be taken again.

        Raises DamagedFile for a folder in the place of a snapshot, and for a damaged hashes.json.
        """
        atomic_files.remove_leftovers(self.folder)
        for snapshot in list_snapshots(self.folder):
            if snapshot.step > step:
                if snapshot.path.is_dir() and not snapshot.path.is_symlink():
                    raise DamagedFile(snapshot.path, "is a folder, not a file: remove it")
                snapshot.path.unlink()
        hashes = read_hashes(self.folder)
        kept = {one.path.name for one in list_snapshots(self.folder)}
        if lost := hashes.keys() - kept:
            self._write_hashes({name: value for name, value in hashes.items() if name not in lost})


def halved(state: dict[str, torch.Tensor], parameters: set[str]) -> dict[str, torch.Tensor]:
    """`state` with its parameters in fp16, which rounds by 2^-12 at most; those out of its range are left as they are.

    bf16 would round by 2^-9, more than most fits are wrong by.
    """
    limit = torch.finfo(torch.float16).max
    return {
        name: value.half() if name in parameters and value.abs().max() < limit else value
        for name, value in state.items()
    }
