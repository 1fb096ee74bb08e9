"""Bundles of checkpoints: the averages that the run itself exports, any step that was kept, the weights as they are."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests_support import ROOT, environment

from dvae.errors import MachineError, UserError
from dvae.models import bundle
from dvae.tools import export as export_tool
from dvae.training.engine.fragments import SavedEngine


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """Six steps of the refiner at ZeRO 2, saved after 2, 4 and 6, of which the last two were kept, and 2 for good."""
    folder = tmp_path_factory.mktemp("export") / "run"
    words = [*tiny, "stages=[shards,encoder,prior,refiner]", "train_refiner.zero_stage=2", "train_refiner.keep_every=2"]
    words += [f"run={folder}", "train_refiner.keep=1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "launch.py"), *words], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_last_checkpoint_is_what_the_run_exported(run: Path, tmp_path: Path) -> None:
    export_tool.command([f"run={run}", f"out={tmp_path / 'made'}"])
    ours, theirs = load_file(tmp_path / "made" / "model.safetensors"), load_file(run / "bundle" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_an_earlier_step_and_the_weights_themselves(run: Path, tmp_path: Path) -> None:
    for average, kind in (("true", "ema"), ("false", "weight")):
        out = tmp_path / kind
        export_tool.command([f"run={run}", f"out={out}", "step=4", f"average={average}"])
        _, made = bundle.load(out)
        saved = SavedEngine(run / "checkpoints" / "refiner" / "step-00000004" / "refiner").state_dict(kind)
        for name, value in made.denoiser.state_dict().items():
            assert torch.equal(value, saved[name]), name


def test_mistakes_are_one_line(run: Path, tmp_path: Path) -> None:
    out = f"out={tmp_path / 'made'}"
    for words, message in (
        ([f"run={tmp_path / 'none'}", out], "no run is there"),
        ([f"run={run}", out, "stage=refinr"], "unknown stage 'refinr': did you mean 'refiner'"),
        ([f"run={run}", out, "step=3"], r"no checkpoint of its refiner at step=3: it has \[2, 4, 6\]"),
        ([f"run={run}", f"out={run}"], "is there already"),
    ):
        with pytest.raises(UserError, match=message):
            export_tool.command(words)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["export", "ema", "recognize", "cache"])
def test_a_tool_without_its_run_says_so(name: str) -> None:
    command = importlib.import_module(f"dvae.tools.{name}").command
    with pytest.raises(UserError, match=r"^not set: .*run; add .*run=\.\.\.$"):
        command(["plugins=[]"])


def test_a_damaged_checkpoint_is_named(run: Path, tmp_path: Path) -> None:
    victim = run / "checkpoints" / "refiner" / "step-00000002" / "refiner" / "rank-00000.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with pytest.raises(MachineError, match=r"is damaged \(refiner/rank-00000.safetensors does not match"):
        export_tool.command([f"run={run}", f"out={tmp_path / 'made'}", "step=2"])
