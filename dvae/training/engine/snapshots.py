"""Snapshots: averages of the weights at some steps of a stage, from which ema_from_snapshots.py makes others.

A stage's folder holds one weights file per snapshot, and hashes.json with the hash of each: {file name: sha256}.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from dvae.config.schema import WIDTHS, EmaProfile
from dvae.errors import MachineError
from dvae.training.engine.ema import EmaSpec
from dvae.utils import atomic_files
from dvae.utils.read import MIB, read_json, read_weights_header
from dvae.utils.weights import StateDict, check_weights, load_weights, refuse_nonfinite, without_numbers

LABELS = {EmaProfile.power: "width", EmaProfile.constant: "decay"}
"""The word in a file name for the number of a profile."""
NAME = re.compile(r"step-([0-9]{8,10})-(width|decay)-([0-9]{1,20}(?:\.[0-9]{1,30})?(?:e-[0-9]{1,3})?)\.safetensors")
LAST_STEP = 10**9
"""The highest step that a snapshot may have."""
HASHES = "hashes.json"
HASHES_LIMIT = 32 * MIB
"""Bytes of hashes.json, at most; one snapshot takes about 120."""


@dataclass(frozen=True)
class WeightSnapshot:
    """One file: one average at one step."""

    step: int
    spec: EmaSpec
    path: Path

    @staticmethod
    def for_step(folder: Path, step: int, spec: EmaSpec) -> WeightSnapshot:
        name = f"step-{step:08d}-{LABELS[spec.profile]}-{spec.value}.safetensors"
        return WeightSnapshot(step, spec, folder / name)

    @staticmethod
    def from_path(path: Path) -> WeightSnapshot | None:
        """The snapshot that a file name describes.

        Returns None if dvae would not give that name: for a step, a width or a decay that no training has, and for
        another spelling of a number, because two files could then claim to be the same snapshot.
        """
        found = NAME.fullmatch(path.name)
        if found is None:
            return None
        step, label, value = int(found[1]), found[2], float(found[3])
        profile = next(profile for profile, name in LABELS.items() if name == label)
        valid = WIDTHS[0] <= value <= WIDTHS[1] if profile is EmaProfile.power else 0.0 <= value < 1.0
        snapshot = WeightSnapshot.for_step(path.parent, step, EmaSpec(profile, value))
        return snapshot if valid and 1 <= step <= LAST_STEP and snapshot.path == path else None

    def load(self, module: torch.nn.Module) -> StateDict:
        """The tensors of the file, which fit `module`; the module may be on the meta device.

        Raises MachineError if the file is damaged, or differs from its hash; UserError if its tensors do not fit, or
        hold NaN or infinity.
        """
        header = read_weights_header(self.path)  # before the hash: the header tells how large the file may be
        expected = read_hashes(self.path.parent).get(self.path.name)
        if expected is None:
            raise MachineError(
                f"{self.path} has no hash in {HASHES}, as after a training that was killed: run the same training "
                "again, or remove the file"
            )
        if atomic_files.sha256(self.path) != expected:
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


def list_snapshots(folder: Path) -> list[WeightSnapshot]:
    """All snapshots in a stage's folder, by step."""
    found = [WeightSnapshot.from_path(path) for path in sorted(folder.glob("step-*"))]
    return [snapshot for snapshot in found if snapshot is not None]
