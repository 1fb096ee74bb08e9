"""Snapshots as files that somebody else may have written: names, hashes, tensors; and after a kill."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dvae.config import compose
from dvae.config.schema import EmaConfig, EmaProfile, TrainingConfig
from dvae.config.stored import stored, to_yaml
from dvae.errors import MachineError, UserError, fold
from dvae.models import components
from dvae.runs.records import write_format
from dvae.tools.ema import command
from dvae.training.ema_from_snapshots import EmaFit, combine_snapshots
from dvae.training.engine.ema import EmaSpec
from dvae.training.engine.snapshot_writer import SnapshotWriter
from dvae.training.engine.snapshots import HASHES, WeightSnapshot, list_snapshots, read_hashes
from dvae.utils import atomic_files

POWER, CONSTANT = EmaProfile.power, EmaProfile.constant
KNOWN = [
    (1, EmaSpec(POWER, 0.05)), (10**9, EmaSpec(POWER, 0.28)), (1000, EmaSpec(POWER, 0.005)),
    (12, EmaSpec(CONSTANT, 0.0)), (12, EmaSpec(CONSTANT, 0.9999)), (12, EmaSpec(CONSTANT, 1e-05)),
]  # fmt: skip
UNKNOWN = [
    "step-00000000-width-0.05", "step-1000000001-width-0.05", "step-" + "9" * 150 + "-width-0.05", "step-5-width-0.05",
    "step-00000005-width-0.0", "step-00000005-width-0.3", "step-00000005-width-0.004", "step-00000005-width-1e-400",
    "step-00000005-decay-1.0", "step-00000005-decay-" + "9" * 400, "step-00000005-width-0.050",
    "step-0000000005-decay-0.0", "step-00000005-width-nan", "step-٠٠٠٠٠٠٠٥-width-0.05",
]  # fmt: skip


@pytest.mark.parametrize(("step", "average"), KNOWN)
def test_a_name_tells_of_its_snapshot(tmp_path: Path, step: int, average: EmaSpec) -> None:
    snapshot = WeightSnapshot.for_step(tmp_path, step, average)
    assert WeightSnapshot.from_path(snapshot.path) == snapshot


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_name_that_no_training_gives_tells_of_nothing(tmp_path: Path, name: str) -> None:
    assert WeightSnapshot.from_path(tmp_path / f"{name}.safetensors") is None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """A run folder with three snapshots of a refiner of two widths; nothing was trained."""
    run = tmp_path_factory.mktemp("snapshots") / "run"
    composed = compose.compose("train", [*tiny, f"run={run}"])
    run.mkdir()
    write_format(run)
    (run / "config.yaml").write_text(to_yaml(stored(composed)))
    denoiser = components.build_models(compose.to_run_config(composed)).trained_parts()["denoiser"]
    writer = SnapshotWriter(run / "snapshots" / "refiner", TrainingConfig())
    for step in (3, 6):
        for width in (0.05, 0.1):
            writer._write(
                WeightSnapshot.for_step(writer.folder, step, EmaSpec(POWER, width)).path, denoiser.state_dict()
            )
    return run


VICTIM = "step-00000006-width-0.05.safetensors"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def with_hash(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """A damage to the tensors of the victim, whose hash then is right."""

    def damage(folder: Path) -> None:
        state = load_file(folder / VICTIM)
        change(state)
        save_file(state, folder / VICTIM)
        hashes = read_hashes(folder) | {VICTIM: atomic_files.sha256(folder / VICTIM)}
        (folder / HASHES).write_text(json.dumps(hashes))

    return damage


def lack(state: dict[str, torch.Tensor]) -> None:
    del state[min(state)]


def reshape(state: dict[str, torch.Tensor]) -> None:
    state[min(state)] = torch.zeros(1, 2, 3)


def infinite(state: dict[str, torch.Tensor]) -> None:
    next(value for value in state.values() if value.is_floating_point()).view(-1)[0] = float("nan")


def pipe(folder: Path) -> None:
    (folder / VICTIM).unlink()
    os.mkfifo(folder / VICTIM)


DAMAGES: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "a flipped byte": (lambda folder: flip(folder / VICTIM), MachineError, "does not match its hash in hashes.json"),
    "no hash": (lambda folder: (folder / HASHES).write_text("{}"), MachineError, "has no hash in hashes.json"),
    "no hashes": (lambda folder: (folder / HASHES).unlink(), MachineError, "has no hash in hashes.json"),
    "hashes are a list": (lambda folder: (folder / HASHES).write_text("[]"), MachineError, "hashes.json: Input should"),
    "a hash is a number": (
        lambda folder: (folder / HASHES).write_text(f'{{"{VICTIM}": 3}}'), MachineError, f"hashes.json: {VICTIM}",
    ),
    "a pipe": (pipe, MachineError, f"{VICTIM}: is a pipe, not a file"),
    "no weights file": (lambda folder: (folder / VICTIM).write_bytes(b""), MachineError, "is not a weights file"),
    "no tensors": (with_hash(dict.clear), UserError, "the weights lack"),
    "a tensor less": (with_hash(lack), UserError, "the weights lack"),
    "a tensor more": (with_hash(lambda state: state.update(x=torch.ones(1))), UserError, "the weights hold 'x'"),
    "another shape": (with_hash(reshape), UserError, "is (1, 2, 3) in the weights"),
    "not finite": (with_hash(infinite), UserError, "holds NaN or infinity"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_snapshot_is_one_line_and_nothing_is_written(made: Path, tmp_path: Path, name: str) -> None:
    damage, kind, says = DAMAGES[name]
    run, out = tmp_path / "run", tmp_path / "out.safetensors"
    shutil.copytree(made, run)
    damage(run / "snapshots" / "refiner")
    with pytest.raises(kind) as caught:
        command([f"run={run}", "width=0.28", "step=4", f"out={out}", f"bundle={tmp_path / 'bundle'}"])
    assert says in fold(caught.value)
    assert str(run / "snapshots" / "refiner") in fold(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_an_average_that_overflows_is_one_line(tmp_path: Path) -> None:
    module, folder = torch.nn.Linear(2, 2), tmp_path / "toy"
    large = {name: torch.full_like(value, 3e38) for name, value in module.state_dict().items()}
    kept = [WeightSnapshot.for_step(folder, step, EmaSpec(POWER, 0.05)) for step in (1, 2)]
    for snapshot in kept:
        SnapshotWriter(folder, TrainingConfig())._write(snapshot.path, large)
    found = combine_snapshots(EmaFit(2, kept, np.array([0.5, 0.5]), 0.0), module)
    assert torch.equal(found["weight"], large["weight"])
    with pytest.raises(UserError, match=r"the average of .*toy at step 2: '\w+' holds NaN or infinity"):
        combine_snapshots(EmaFit(2, kept, np.array([0.5, 1.5]), 0.0), module)


def test_names_that_no_training_gives_change_nothing(made: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(made, run)
    command([f"run={made}", "width=0.15", f"out={tmp_path / 'whole.safetensors'}"])
    folder = run / "snapshots" / "refiner"
    for name in ("step-00000000-width-0.05", "step-00000005-width-0.0", "step-" + "9" * 150 + "-width-0.05"):
        shutil.copyfile(folder / VICTIM, folder / f"{name}.safetensors")
    command([f"run={run}", "width=0.15", f"out={tmp_path / 'out.safetensors'}"])
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    kept = load_file(tmp_path / "out.safetensors")
    assert all(torch.allclose(value, kept[name], atol=1e-5) for name, value in load_file(folder / VICTIM).items())


def test_a_stage_that_the_config_does_not_have_is_one_line(made: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(made, run)
    shutil.copytree(run / "snapshots" / "refiner", run / "snapshots" / "classifier")
    with pytest.raises(UserError, match=r"stage=classifier: by its config, run=.* has none with weights"):
        command([f"run={run}", "stage=classifier", "width=0.15", f"out={tmp_path / 'out.safetensors'}"])


def test_steps_that_are_taken_again_lose_their_files_and_hashes(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "refiner"
    shutil.copytree(made / "snapshots" / "refiner", folder)
    assert read_hashes(folder) == {one.path.name: atomic_files.sha256(one.path) for one in list_snapshots(folder)}
    shutil.copyfile(folder / VICTIM, folder / "step-00000007-width-0.05.safetensors")  # killed before its hash
    SnapshotWriter(folder, TrainingConfig(ema=EmaConfig())).drop_after(5)
    left = ["step-00000003-width-0.05.safetensors", "step-00000003-width-0.1.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([HASHES, *left])
    assert sorted(read_hashes(folder)) == left


def test_a_folder_in_the_place_of_a_snapshot_is_one_line(tmp_path: Path) -> None:
    (tmp_path / VICTIM).mkdir()
    with pytest.raises(MachineError, match=r"width-0\.05\.safetensors: is a folder, not a file"):
        SnapshotWriter(tmp_path, TrainingConfig()).drop_after(0)
