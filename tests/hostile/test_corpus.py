"""Whatever a stranger gives us ends in equal results or in one line: nothing is executed, sent, or taken beyond bounds."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from harness import Ended, Zygote, listening
from hostile_bundles import HostileBundle, hostile_bundles, noise
from tests_support import reseal

from dvae import bundle, config, models


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """A folder with a sound bundle, of a run that was never trained, and images."""
    folder = tmp_path_factory.mktemp("sound")
    settings = config.typed(config.compose("train", [*tiny, "denoiser.data_scale=1", "train_refiner.precision=fp32"]))
    made = models.build(settings)
    with torch.no_grad():
        made.denoiser.refiner.out[2].weight.normal_(std=0.02)  # it starts at zero
    bundle.export(folder / "bundle", settings, {name: part.state_dict() for name, part in made.trained().items()})
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
