"""A component in one file: as a module, and as an installed third-party package whose schedule trains."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests_support import ROOT


def launch(*words: str, path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """tools/launch.py in a fresh interpreter, with `path` first on PYTHONPATH."""
    environment = os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools" / "launch.py"), *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_example_of_contributing_is_a_whole_component(tmp_path: Path, tiny: list[str]) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert code is not None
    (tmp_path / "my_schedule.py").write_text(code.group(1))
    words = [*tiny, "plugins=[my_schedule]", "schedule=constant_rate", "schedule.beta=10"]
    done = launch(*words, f"run={tmp_path}/run", path=tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "name: constant_rate\n  beta: 10" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample package, pip-installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(ROOT / "tests" / "plugins", folder / "source")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder / "site")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(folder / "source")], check=True)
    return folder / "site"


@pytest.mark.slow
def test_an_installed_plugin_trains(installed: Path, tmp_path: Path, tiny: list[str]) -> None:
    words = [*tiny, "schedule=sigmoid_sample", "schedule.end=4"]
    done = launch(*words, f"run={tmp_path}/run", path=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    about = (tmp_path / "run" / "bundle" / "bundle.json").read_text()
    assert '"package": "dvae_sample_plugin"' in about
    assert '"version": "1.2.3"' in about


def test_a_broken_plugin_breaks_nothing_and_is_named_where_a_name_is_not_found(installed: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(installed, site)
    (site / "dvae_sample_plugin" / "__init__.py").write_text("raise RuntimeError('no such luck')\n")
    fine = launch("recipe=demo", "dry_run=true", path=site, cwd=tmp_path)
    assert fine.returncode == 0, fine.stderr
    missing = launch("recipe=demo", "dry_run=true", "schedule=sigmoid_sample", path=site, cwd=tmp_path)
    assert missing.returncode == 2
    assert "sample (dvae_sample_plugin): RuntimeError: no such luck" in missing.stderr
    assert len(missing.stderr.strip().splitlines()) == 1


def test_components_lists_name_summary_fields_and_package(installed: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "components.py"), "schedule"]
    environment = os.environ | {"PYTHONPATH": f"{installed}{os.pathsep}{ROOT}"}
    listed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert re.search(r"sigmoid_sample +abar\(t\) falls along a sigmoid.*\[dvae_sample_plugin 1\.2\.3\]", listed)
    assert re.search(r"cosine .*\[dvae [0-9.]+\]", listed)
    assert "schedule.start=-3.0" in listed
