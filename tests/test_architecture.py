"""The plan of the house, checked: which way imports run, who alone may import what, and what is installed."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tests_support import ROOT, environment

PACKAGE = ROOT / "dvae"
ONLY = {
    "xformers": {"layers/attention.py"},
    "deepspeed": {"training/engine/deepspeed_engine.py"},
    "wandb": {"tracking/wandb_run.py"},
    "torch_fidelity": {"evaluation/metrics.py"},
    "sweeps": {"experiments/sweeps/sweep_engine.py"},
    "submitit": {"launchers/slurm.py"},
    "gradio": {"app/page.py"},
}


def sources() -> list[tuple[str, ast.Module]]:
    found = [(path.relative_to(PACKAGE).as_posix(), path) for path in PACKAGE.rglob("*.py")]
    for name in ("launchers", "recipes", "tools"):  # rglob does not follow the symlinks
        found += [(f"{name}/{path.name}", path) for path in (ROOT / name).rglob("*.py")]
    return [(name, ast.parse(path.read_text(encoding="utf-8"))) for name, path in sorted(set(found))]


def imported(tree: ast.Module) -> set[str]:
    """Modules that a file imports, those that only the type checker reads left out."""
    skipped = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.dump(test.test)
        for node in ast.walk(test)
    }
    modules: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


@pytest.mark.parametrize("library", ONLY)
def test_a_library_has_one_importer(library: str) -> None:
    users = {name for name, tree in sources() if any(m.partition(".")[0] == library for m in imported(tree))}
    # importlib.import_module is how attention.py reaches xformers
    assert users <= ONLY[library], users - ONLY[library]


PARSERS = {
    "json.load", "json.loads", "yaml.load", "yaml.safe_load", "OmegaConf.load", "np.load", "np.loadtxt", "torch.load",
    "load_file", "safe_open", "pickle.load", "pickle.loads", "Image.open", "zipfile.ZipFile", "tarfile.open",
}  # fmt: skip
"""Calls that read what somebody may have written."""
MAY_PARSE = {
    "utils/read.py": PARSERS,
    "utils/user_yaml.py": {"yaml.load"},  # files that the user wrote, with a safe loader
    "utils/weights.py": {"load_file"},  # after the header was checked
    "inference/directions/direction_files.py": {"safe_open"},  # likewise
    "training/engine/fragments.py": {"safe_open"},  # likewise
    "training/resilience/ranks.py": {"pickle.loads"},  # what ranks of this very run say to each other
    "evaluation/metrics.py": {"torch.load", "zipfile.ZipFile"},  # a package's weights, as plain tensors
    "data/archives.py": {"zipfile.ZipFile", "tarfile.open"},  # with bounds
    "data/shards/tar_files.py": {"tarfile.open"},  # the index of a shard that dvae has just written
    "data/images.py": {"Image.open"},  # of the intended formats, with a bound on the pixels
    "inference/generation/formats.py": {"zipfile.ZipFile"},  # written, not read
    "models/importers/checkpoint_file.py": {"zipfile.ZipFile"},  # its own bounded reader of checkpoints
    "registry/sources/mnist_5k.py": {"np.loadtxt"},  # a text whose size was checked
    "tracking/report.py": {"Image.open"},  # PNG alone, with a bound on the pixels
}
"""Files that may, and why."""


def called(tree: ast.Module) -> set[str]:
    """Names that a file calls: "json.loads", "load_file"."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_files_are_read_through_the_bounded_readers() -> None:
    seen = set()
    for name, tree in sources():
        parsing = called(tree) & PARSERS
        seen |= parsing
        assert parsing <= MAY_PARSE.get(name, set()), f"{name} calls {sorted(parsing)}: use dvae/utils/read.py"
    assert {"json.loads", "yaml.load", "load_file"} <= seen


def test_launchers_recipes_and_tools_are_imported_as_parts_of_dvae() -> None:
    for name, tree in sources():
        assert not {m.partition(".")[0] for m in imported(tree)} & {"launchers", "recipes", "tools"}, name


@pytest.mark.slow
def test_a_wheel_installs_only_dvae_and_its_command(tmp_path: Path) -> None:
    left_out = shutil.ignore_patterns(".venv*", ".git", "build", "runs", "tests", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=left_out)  # a build leaves files in its tree
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(tmp_path / "source")], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"dvae"}
    for needed in ("dvae/recipes/recipe/demo.yaml", "dvae/tools/launch.py", "dvae/tracking/report.html.jinja"):
        assert needed in names
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {"dvae", "bin"}
    done = subprocess.run(
        [sys.executable, str(site / "bin" / "dvae"), "launch", "recipe=demo", "dry_run=true"],
        cwd=tmp_path, env=environment(PYTHONPATH=str(site)), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "dry run: nothing was written" in done.stdout
