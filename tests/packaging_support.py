"""Virtual environments that hold some installed packages and what these need, and nothing else; made in a second.

The packages are links to those of the environment that runs the tests, so that nothing is downloaded.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import venv
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def needed(requirements: Iterable[str]) -> set[str]:
    """The names of the distributions that pip would install for these requirements, here. Versions must fit."""
    found: set[tuple[str, str]] = set()
    left = [(Requirement(text), "") for text in requirements]
    while left:
        requirement, extra = left.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        of = importlib.metadata.distribution(name)
        assert requirement.specifier.contains(of.version, prereleases=True), f"{requirement}: {of.version} is installed"
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in found:
                found.add((name, wanted))
                left += [(Requirement(text), wanted) for text in of.requires or ()]
    return {name for name, _ in found}


def environment_of(folder: Path, requirements: Iterable[str], wheel: Path) -> Path:
    """A virtual environment in `folder` with what the requirements need, and with the wheel alone; returns its bin/."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    owners: dict[str, list[Path]] = defaultdict(list)
    for name in needed(requirements):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if ".." not in file.parts}:
            owners[top].append(Path(str(distribution.locate_file(top))))
    for top, places in owners.items():
        (site / top).symlink_to(places[0])  # namespace packages of several owners lie in one folder here, too
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True)
    return folder / "bin"


def build_wheel(root: Path, folder: Path) -> Path:
    """The wheel of the package in `root`, built from a copy of it in `folder`."""
    source = folder / "source"
    source.mkdir(parents=True)  # a copy, because a build leaves files in its tree
    for name in ("dvae", "launchers", "recipes", "tools"):
        shutil.copytree(root / name, source / name, True, shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "README.md"):
        shutil.copyfile(root / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(source)], check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel
