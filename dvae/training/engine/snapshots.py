"""Read snapshots: averaged weights at some steps of a stage, from which ema_from_snapshots.py reconstructs others.

The folder of a stage holds one weights file per snapshot, and hashes.json: {file name: sha256}.
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
"""The word before the value of a profile in a file name."""
NAME = re.compile(r"step-([0-9]{8,10})-(width|decay)-([0-9]{1,20}(?:\.[0-9]{1,30})?(?:e-[0-9]{1,3})?)\.safetensors")
LAST_STEP = 10**9
"""Largest step that a snapshot may have."""
HASHES = "hashes.json"
HASHES_LIMIT = 32 * MIB
"""Largest accepted size of hashes.json, in bytes. One snapshot takes about 120 bytes."""


@dataclass(frozen=True)
class WeightSnapshot:
    """A file that holds one average at one step."""

    step: int
    spec: EmaSpec
    path: Path

    @staticmethod
    def for_step(folder: Path, step: int, spec: EmaSpec) -> WeightSnapshot:
        """The snapshot of an average at `step`; the file need not exist."""
        name = f"step-{step:08d}-{LABELS[spec.profile]}-{spec.value}.safetensors"
        return WeightSnapshot(step, spec, folder / name)

    @staticmethod
    def from_path(path: Path) -> WeightSnapshot | None:
        """Parse the name of a snapshot's file.

        Returns None for a name that dvae never writes. That is a step, width or decay out of range, or another spelling
        of a number: with other spellings, two files could claim to be the same snapshot.
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
        """Load the state dict from the file, after it was checked. `module` may be on the meta device.

        Raises MachineError if the file is damaged or does not match its hash. Raises UserError if the tensors do not
        fit `module`, or contain NaN or infinity.
        """
        # Read the header before the hash: it limits the size of the file, and hashing a huge file would take long.
        header = read_weights_header(self.path)
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
    """Read the hashes of the snapshots in a stage's folder: {file name: sha256}.

    Returns {} if there is no hashes.json. Raises DamagedFile if it is damaged.
    """
    path = folder / HASHES
    return read_json(path, dict[str, str], HASHES_LIMIT) if path.exists() else {}


def list_snapshots(folder: Path) -> list[WeightSnapshot]:
    """All snapshots in a stage's folder, in the order of their steps. The files are not opened."""
    found = [WeightSnapshot.from_path(path) for path in sorted(folder.glob("step-*"))]
    return [snapshot for snapshot in found if snapshot is not None]
