"""The package as users install it: the wheel with all that it needs, and with the short list for inference alone."""

from __future__ import annotations

import ast
import importlib.metadata
import itertools
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging_support import build_wheel, environment_of, needed
from tests_support import ROOT, environment

OWNER_NAMED = {
    "torch", "deepspeed", "webdataset", "wandb", "hydra-core", "xformers", "torch-fidelity", "submitit",
}  # fmt: skip
EXTRAS = {"page", "parquet", "sweep", "dev"}
NOT_ON_AN_INDEX = {"sweeps"}
"""Packages that setup.py cannot name: it says why."""


def requirements() -> tuple[list[str], dict[str, list[str]]]:
    """install_requires and extras_require, as setup.py has them."""
    (call,) = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)
               and getattr(node.func, "id", "") == "setup"]  # fmt: skip
    given = {word.arg: word.value for word in call.keywords}
    return ast.literal_eval(given["install_requires"]), ast.literal_eval(given["extras_require"])


def inference_list() -> list[str]:
    lines = (ROOT / "requirements-inference.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_install_brings_what_the_main_job_needs() -> None:
    plain, extras = requirements()
    assert {Requirement(text).name for text in plain} >= OWNER_NAMED
    assert set(extras) == EXTRAS


def test_what_is_imported_is_required() -> None:
    """By name, not only because another package needs it; else in an extra."""
    plain, extras = requirements()
    named = {canonicalize_name(Requirement(text).name) for text in itertools.chain(plain, *extras.values())}
    providers = importlib.metadata.packages_distributions()
    for path in [*(ROOT / "dvae").rglob("*.py"), *(ROOT / "tools").rglob("*.py"), *(ROOT / "launchers").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module]
            else:
                continue
            for top in {module.partition(".")[0] for module in modules} - {"dvae", "__future__"}:
                if top in sys.stdlib_module_names:
                    continue
                owners = {canonicalize_name(name) for name in providers.get(top, [top])}
                assert owners & (named | NOT_ON_AN_INDEX), f"{path.name} imports {top}, which setup.py does not require"


def test_the_inference_list_has_the_ranges_of_setup() -> None:
    plain, _ = requirements()
    assert set(inference_list()) < set(plain)
    brought = needed(inference_list())
    assert len(brought) < 0.5 * len(needed(plain))
    assert brought.isdisjoint({"deepspeed", "wandb", "submitit", "xformers", "torch-fidelity", "matplotlib"})


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of an environment with the wheel and what it requires, without extras."""
    return environment_of(tmp_path_factory.mktemp("whole") / "venv", requirements()[0], wheel)


@pytest.fixture(scope="module")
def slim(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of an environment with the wheel and the list for inference."""
    return environment_of(tmp_path_factory.mktemp("slim") / "venv", inference_list(), wheel)


def dvae(place: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command dvae of an environment."""
    clean = {name: value for name, value in environment().items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [str(place / "dvae"), *words]
    return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_wheel_holds_only_dvae_and_its_files(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"dvae"}
    for needed_file in ("recipes/recipe/demo.yaml", "tools/launch.py", "tracking/report.html.jinja", "py.typed"):
        assert f"dvae/{needed_file}" in names
    tracked = {path.relative_to(ROOT / "recipes").as_posix() for path in (ROOT / "recipes").rglob("*.yaml")}
    assert tracked == {name.removeprefix("dvae/recipes/") for name in names if name.endswith(".yaml")}


@pytest.fixture(scope="module")
def trained(installed: Path, tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """A folder in which the wheel has trained the demo, in small, with its metrics, into run/."""
    folder = tmp_path_factory.mktemp("trained")
    words = [word for word in tiny if not word.startswith("evaluate.metrics")]
    done = dvae(installed, folder, "launch", *words, "run=run", "evaluate.kid_subset_size=4")
    assert done.returncode == 0, done.stderr
    assert "KID" in (folder / "run" / "summary.json").read_text()
    return folder


@pytest.mark.slow
def test_the_wheel_trains_and_finds_directions(trained: Path, installed: Path) -> None:
    words = ["run=run", "find=[pca]", "n_train=100", "components=2"]
    done = dvae(installed, trained, "directions", *words)
    assert done.returncode == 0, done.stderr
    assert "pca_1" in done.stdout


@pytest.mark.slow
def test_the_wheel_takes_what_lies_outside_the_repository(installed: Path, tmp_path: Path, tiny: list[str]) -> None:
    """A module of the working folder, a recipe by its path, and the folder recipes/ of a package."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name, code in re.findall(r"`(my_\w+\.py)`:\n\n```python\n(.*?)```", text, re.DOTALL):
        (tmp_path / name).write_text(code)
    recipe = "defaults: [demo, _self_]\nplugins: [my_stage]\ntrain_brightness: {steps: 4, batch: 8}\n"
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.yaml").write_text(recipe)
    shutil.copytree(ROOT / "tests" / "plugins" / "dvae_sample_plugin", tmp_path / "dvae_sample_plugin")
    stages = "stages=[shards,encoder,brightness]"
    done = dvae(installed, tmp_path, "launch", f"recipe={tmp_path}/own/mine.yaml", *tiny[1:], stages)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "mine" / "weights" / "brightness.safetensors").exists()
    words = ["plugins=[dvae_sample_plugin]", "recipe=sample_demo", "dry_run=true"]
    told = dvae(installed, tmp_path, "launch", *words)
    assert told.returncode == 0, told.stderr
    assert "recipe: sample_demo" in told.stdout
    listed = dvae(installed, tmp_path, "components", "schedule", "plugins=[my_schedule]")
    assert "constant_rate" in listed.stdout


@pytest.mark.slow
def test_the_short_list_is_enough_to_use_a_bundle(trained: Path, slim: Path, installed: Path) -> None:
    """Loaded, sampled, reconstructed, edited, in an environment without training; the samples are the same bits."""
    dvae(installed, trained, "directions", "run=run", "find=[pca]", "n_train=100", "components=2")
    shutil.copytree(trained / "run" / "bundle", trained / "bundle")
    image = "images=run/images/heldout.png"
    for words in (
        ["sample", "run=bundle", "n=4", "out=slim.npy"],
        ["reconstruct", "run=bundle", image, "resize=true", "n=1", "out=reconstructed.png"],
        ["edit", "run=bundle", "direction=pca_1", image, "resize=true", "n=1", "out=edited.png"],
        ["edit", "run=bundle", "direction=pca_2", "images=drawn", "n=2", "out=drawn.png"],
        ["interpolate", "run=bundle", "images=drawn", "out=between.png"],
        ["inpaint", "run=bundle", image, "resize=true", "n=1", "out=inpainted.png"],
    ):
        done = dvae(slim, trained, *words)
        assert done.returncode == 0, done.stderr
    dvae(installed, trained, "sample", "run=bundle", "n=4", "out=whole.npy")
    assert (trained / "slim.npy").read_bytes() == (trained / "whole.npy").read_bytes()
    script = "import dvae; print(dvae.load('bundle').generate(2, seed=0)[1].shape)"
    loaded = subprocess.run(
        [slim / "python", "-c", script], cwd=trained, env=environment(), capture_output=True, text=True
    )
    assert "torch.Size([2, 3, 16, 16])" in loaded.stdout, loaded.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launch", "recipe=demo", "run=new"], "source=avatars needs dicebear: pip install"),
        (["launch", "recipe=toy2d", "run=new"], "the package deepspeed is not installed: `pip install dvae` brings"),
        (["study", "study=avatars"], "the package matplotlib is not installed: `pip install dvae` brings"),
        (["page", "run=new"], "the page needs gradio, which is not installed: pip install"),
    ],
)
def test_what_the_short_list_lacks_is_one_line(slim: Path, tmp_path: Path, words: list[str], said: str) -> None:
    done = dvae(slim, tmp_path, *words)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert said in done.stderr
    assert not list(tmp_path.iterdir())
