"""Whatever a stranger gives us ends in equal results or in one line; nothing is executed or sent."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from harness import Ended, Zygote, listening
from hostile_bundles import HostileBundle, hostile_bundles, noise
from hostile_runs import HostileRun, hostile_runs
from tests_support import ROOT, environment, reseal

from dvae.config import compose
from dvae.models import bundle_export, components


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """A folder with a sound bundle, of a run that was never trained, and images."""
    folder = tmp_path_factory.mktemp("sound")
    settings = compose.to_run_config(
        compose.compose("train", [*tiny, "denoiser.data_scale=1", "train_refiner.precision=fp32"])
    )
    made = components.build_models(settings)
    with torch.no_grad():
        made.denoiser.refiner.out[2].weight.normal_(std=0.02)  # it starts at zero
    bundle_export.export(
        folder / "bundle", settings, {name: part.state_dict() for name, part in made.trained_parts().items()}
    )
    noise(folder)
    return folder


@pytest.fixture(scope="module")
def zygote(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    made = Zygote(
        [{"tool": "sample", "words": words("sample", sound / "bundle"), "cwd": str(tmp_path_factory.mktemp("warm"))}]
    )
    yield made
    made.close()


def words(tool: str, folder: Path) -> list[str]:
    """What a user asks for of a bundle."""
    more = {
        "sample": [f"n={2}"],
        "reconstruct": ["n=1"],
        "edit": ["n=1", f"images={folder.parent / 'images.npy'}", "direction=wide", "strength=1"],
    }
    return [f"run={folder}", "out=x.npy", *more[tool]]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def images(zygote: Zygote, sound: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Hash of what the sound bundle draws."""
    cwd = tmp_path_factory.mktemp("images")
    assert zygote.run("sample", *words("sample", sound / "bundle"), cwd=cwd).status == 0
    return digest(cwd / "x.npy")


def attack(case: HostileBundle, sound: Path, cwd: Path, zygote: Zygote) -> Ended:
    """Run the tool on a copy of the sound bundle that `case` has changed."""
    folder = cwd / "bundle"
    shutil.copytree(sound / "bundle", folder)
    shutil.copyfile(sound / "images.npy", cwd / "images.npy")
    (cwd / "evil_module.py").write_text("open('PWNED', 'w')\n")
    case.change(folder)
    if case.sealed:
        reseal(folder)
    return zygote.run(case.tool, *words(case.tool, folder), cwd=cwd, path=[str(cwd)])


def test_hostile_bundles(sound: Path, zygote: Zygote, images: str, tmp_path: Path) -> None:
    wrong: dict[str, list[str]] = {}
    with listening() as (address, heard):
        cases = list(hostile_bundles(address))
        assert len({case.name for case in cases}) == len(cases) > 300
        for number, case in enumerate(cases):
            cwd = tmp_path / str(number)
            cwd.mkdir()
            ended = attack(case, sound, cwd, zygote)
            found = ended.faults(case.sound)
            if list(cwd.rglob("PWNED")):
                found.append("a command was run")
            if case.sound and ended.status == 0 and digest(cwd / "x.npy") != images:
                found.append("other images")
            if found:
                wrong[case.name] = found
        assert heard == []
    assert not wrong, "\n".join(f"{name}: {found}" for name, found in wrong.items())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """A small finished run, with its shards in it and a relative path of its own."""
    folder = tmp_path_factory.mktemp("finished")
    command = [sys.executable, str(ROOT / "tools" / "launch.py"), *tiny, "run=run"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder / "run"


LOOKS = {
    "runs": ["list", "in=."],
    "sample": ["run=run", "n=1", "out=x.npy"],
    "reconstruct": ["run=run", "n=1", "out=y.npy"],
    "export": ["run=run", "out=exported"],
}
"""What is asked of each run folder."""


def run_folders(every: int) -> list[HostileRun]:
    """A run folder as it is, and every so many of the hostile ones."""
    cases = list(hostile_runs())
    assert len({case.name for case in cases}) == len(cases) > 1000
    return [HostileRun("unchanged", lambda folder: None), *cases[::every]]


@pytest.mark.parametrize("every", [17, pytest.param(7, marks=pytest.mark.slow)])
def test_hostile_run_folders(every: int, finished: Path, zygote: Zygote, tmp_path: Path) -> None:
    wrong: dict[str, list[str]] = {}
    cases = run_folders(every)
    for number, (name, mutate) in enumerate(cases):
        cwd = tmp_path / str(number)
        shutil.copytree(finished, cwd / "run", symlinks=True)
        (cwd / "evil_module.py").write_text("open('PWNED', 'w')\n")
        mutate(cwd / "run")
        for tool, asked in LOOKS.items():
            ended = zygote.run(tool, *asked, cwd=cwd, path=[str(cwd)])
            found = ended.faults(sound=True if name == "unchanged" or tool == "runs" else None)
            if list(cwd.rglob("PWNED")):
                found.append("a command was run")
            if found:
                wrong[f"{name}, {tool}"] = found
        shutil.rmtree(cwd)
    assert not wrong, "\n".join(f"{name}: {found}" for name, found in wrong.items())


RESUME = ["evaluate.n=9"]
"""A setting that lets the last stage be run again."""


@pytest.mark.slow
def test_hostile_run_folders_are_resumed_or_refused(
    finished: Path, zygote: Zygote, tiny: list[str], tmp_path: Path
) -> None:
    """The same folders, taken up by the command of the run: DeepSpeed starts in each, which takes seconds."""
    wrong: dict[str, list[str]] = {}
    usual: set[str] = set()
    for number, (name, mutate) in enumerate(run_folders(67)):
        cwd = tmp_path / str(number)
        shutil.copytree(finished, cwd / "run", symlinks=True)
        mutate(cwd / "run")
        ended = zygote.run("launch", *tiny, "run=run", *RESUME, cwd=cwd)
        usual = usual or ended.shapes()  # of the first, which is sound
        found = ended.faults(sound=True if name == "unchanged" else None, usual=usual)
        if found:
            wrong[name] = found
    assert not wrong, "\n".join(f"{name}: {found}" for name, found in wrong.items())
