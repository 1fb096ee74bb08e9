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
    "deepspeed": {"training/engine.py"},
    "wandb": {"tracking/wandb_run.py"},
    "torch_fidelity": {"evaluation/metrics.py"},
    "sweeps": {"sweeps/engine.py"},
    "submitit": {"launchers/slurm.py"},
    "gradio": {"page.py"},
}
ABOVE = {
    "layers": ["registry.encoders", "registry.refiners", "diffusion", "denoiser", "training", "pipeline", "evaluation"],
    "registry": ["denoiser", "training", "pipeline", "evaluation", "tracking", "launchers", "tools", "job", "run"],
    "diffusion.py": ["denoiser", "training", "pipeline", "evaluation", "tracking", "launchers", "tools"],
    "denoiser.py": ["training", "pipeline", "evaluation", "tracking", "launchers", "tools"],
    "data": ["training", "pipeline", "evaluation", "launchers", "tools", "denoiser", "diffusion"],
    "training": ["launchers", "tools", "evaluation", "job"],
    "evaluation": ["launchers", "tools", "training", "job"],
    "planning": ["launchers", "tools", "pipeline", "evaluation", "job"],
    "tracking": ["launchers", "tools", "training", "evaluation", "job"],
    "quantisation": ["launchers", "tools", "training", "job"],
    "sweeps": ["launchers", "tools", "training", "evaluation", "job", "pipeline"],
}
"""Part of the package -> parts that lie above it, which it must not import."""


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


@pytest.mark.parametrize("part", ABOVE)
def test_imports_run_one_way(part: str) -> None:
    seen = 0
    for name, tree in sources():
        if name == part or name.startswith(f"{part}/"):
            seen += 1
            wrong = [m for m in imported(tree) for up in ABOVE[part] if f"{m}.".startswith(f"dvae.{up}.")]
            assert not wrong, f"{name} imports {wrong}"
    assert seen, f"nothing is called {part}"


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
