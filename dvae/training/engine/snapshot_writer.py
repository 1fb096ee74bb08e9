"""Write snapshots of the averaged weights of a stage during training."""

from __future__ import annotations

from pathlib import Path

import torch

from dvae.config.schema import EmaProfile, TrainingConfig
from dvae.training.engine.deepspeed_engine import Engine
from dvae.training.engine.ema import MAIN, ema_specs
from dvae.training.engine.snapshots import HASHES, WeightSnapshot, list_snapshots, read_hashes
from dvae.training.resilience import ranks
from dvae.utils import atomic_files
from dvae.utils.read import DamagedFile
from dvae.utils.weights import StateDict, save_weights


class SnapshotWriter:
    """Writes the snapshots of one stage: folder/step-00001000-width-0.05.safetensors, ...

    If the process is killed after it wrote a snapshot and before it wrote the hash, the file has no hash. The
    checkpoint of a step is always written after its snapshots. So a resumed run starts before that step, removes the
    file (`drop_after`), and writes the snapshot again.
    """

    def __init__(self, folder: Path, training: TrainingConfig) -> None:
        self.folder = folder
        self.every = training.ema.snapshot_every
        self.last = training.steps
        # Leave out the exported average if its profile is constant: the run keeps it anyway, and no other average can
        # be reconstructed from it.
        self.specs = {
            name: spec
            for name, spec in ema_specs(training.ema).items()
            if name != MAIN or spec.profile is EmaProfile.power
        }

    def write_if_due(self, step: int, engine: Engine) -> None:
        """Write a snapshot of each average if one is due at `step`: every `every` steps, and at the last step.

        Every rank takes part, and rank 0 writes. Raises MachineError if a file cannot be written.
        """
        if not self.every or (step % self.every and step != self.last):
            return
        parameters = {name for name, _ in engine.module.named_parameters()}
        for name, spec in self.specs.items():
            state = engine.averaged_weights(name)
            ranks.on_rank_zero(
                self._write, WeightSnapshot.for_step(self.folder, step, spec).path, to_half(state, parameters)
            )

    def _write(self, path: Path, state: StateDict) -> None:
        """Write one snapshot, then its hash, which is computed from the file."""
        save_weights(path, state)
        self._write_hashes(read_hashes(self.folder) | {path.name: atomic_files.sha256(path)})

    def _write_hashes(self, hashes: dict[str, str]) -> None:
        atomic_files.write_json(self.folder / HASHES, hashes)

    def drop_after(self, step: int) -> None:
        """Remove the snapshots after `step` and their hashes, because the run is about to repeat these steps.

        Raises DamagedFile if a folder has the name of a snapshot, or if hashes.json is damaged.
        """
        atomic_files.remove_leftovers(self.folder)
        for snapshot in list_snapshots(self.folder):
            if snapshot.step > step:
                if snapshot.path.is_dir() and not snapshot.path.is_symlink():
                    raise DamagedFile(snapshot.path, "is a folder, not a file: remove it")
                snapshot.path.unlink()
        hashes = read_hashes(self.folder)
        names = {snapshot.path.name for snapshot in list_snapshots(self.folder)}
        if removed := hashes.keys() - names:
            self._write_hashes({name: value for name, value in hashes.items() if name not in removed})


def to_half(state: dict[str, torch.Tensor], parameters: set[str]) -> dict[str, torch.Tensor]:
    """Convert the parameters of `state` to fp16. A parameter with values outside the range of fp16 is not converted.

    The relative rounding error of fp16 is at most 2^-11 (of numbers above 6e-5). bf16 would be too coarse: its error of
    up to 2^-8 is larger than the error of most fits.
    """
    limit = torch.finfo(torch.float16).max
    return {
        name: value.half() if name in parameters and value.abs().max() < limit else value
        for name, value in state.items()
    }
