"""The writer of the snapshots of a stage while it is trained."""

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
    """The snapshots of one stage while it is trained: folder/step-00001000-width-0.05.safetensors, ...

    A process that is killed between a snapshot and its hash leaves a file without one. The checkpoint of that step is
    written later, so a resumed training begins before the step: it removes the file, and takes the snapshot again.
    """

    def __init__(self, folder: Path, training: TrainingConfig) -> None:
        self.folder = folder
        self.every = training.ema.snapshot_every
        self.last = training.steps
        self.specs = {
            name: spec
            for name, spec in ema_specs(training.ema).items()
            if name != MAIN or spec.profile is EmaProfile.power
        }

    def write_if_due(self, step: int, engine: Engine) -> None:
        """Write a snapshot of each average if one is due at `step`. Every rank takes part, rank 0 writes.

        Raises MachineError if one could not be written.
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
        names = {snapshot.path.name for snapshot in list_snapshots(self.folder)}
        if removed := hashes.keys() - names:
            self._write_hashes({name: value for name, value in hashes.items() if name not in removed})


def to_half(state: dict[str, torch.Tensor], parameters: set[str]) -> dict[str, torch.Tensor]:
    """`state` with its parameters in fp16, which rounds by 2^-12 at most; those out of its range are left as they are.

    bf16 would round by 2^-9, more than most fits are wrong by.
    """
    limit = torch.finfo(torch.float16).max
    return {
        name: value.half() if name in parameters and value.abs().max() < limit else value
        for name, value in state.items()
    }
