"""What a user who only wants images has to import: no training, no cluster, no sweeps, no W&B."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests_support import ROOT, environment

from dvae.config import compose
from dvae.models import bundle_export, components

HEAVY = ("deepspeed", "submitit", "wandb", "sweeps", "gradio")
"""Libraries that images do not need."""
NOT_FOR_IMAGES = (
    "dvae.app", "dvae.experiments", "dvae.launchers", "dvae.planning", "dvae.runs.job", "dvae.runs.manage",
    "dvae.runs.slurm", "dvae.stages", "dvae.training",
)  # fmt: skip
"""Modules of dvae that images do not need."""
REPORT = "import json, sys; print(json.dumps(sorted(sys.modules)))"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """A bundle of a run that was never trained."""
    config = compose.to_run_config(compose.compose("train", [*tiny, "denoiser.data_scale=1"]))
    weights = {name: part.state_dict() for name, part in components.build_models(config).trained_parts().items()}
    folder = tmp_path_factory.mktemp("imports") / "bundle"
    bundle_export.export(folder, config, weights)
    return folder


def modules_after(code: str, folder: Path) -> list[str]:
    """The names of all modules that are loaded after some lines of Python in a fresh interpreter."""
    command = [sys.executable, "-c", f"{code}\n{REPORT}"]
    done = subprocess.run(
        command, cwd=folder, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    names: list[str] = json.loads(done.stdout.splitlines()[-1])
    return names


def assert_light(modules: list[str], most: int) -> None:
    """Nothing is loaded that images do not need, and no more than `most` modules of dvae."""
    forbidden = (*HEAVY, *NOT_FOR_IMAGES)
    assert [name for name in modules if f"{name}.".startswith(tuple(f"{one}." for one in forbidden))] == []
    own = [name for name in modules if f"{name}.".startswith("dvae.")]
    assert len(own) <= most, f"{len(own)} modules: {own}"


def test_importing_dvae_imports_nothing_heavy(tmp_path: Path) -> None:
    modules = modules_after("import dvae; assert callable(dvae.load)", tmp_path)
    assert_light(modules, 5)
    assert not {"torch", "numpy", "hydra"} & set(modules)


def test_loading_a_bundle_and_sampling_imports_only_that(bundle: Path, tmp_path: Path) -> None:
    code = f"import dvae; vae, refined = dvae.load({str(bundle)!r}).generate(2, seed=0); assert len(refined) == 2"
    assert_light(modules_after(code, tmp_path), 140)


def test_the_command_that_draws_samples_imports_only_that(bundle: Path, tmp_path: Path) -> None:
    words = [f"run={bundle}", "n=2", "out=samples.png", "sampler.steps=2"]
    code = f"from dvae.tools import sample; sample.command({words!r})"
    assert_light(modules_after(code, tmp_path), 160)
    assert (tmp_path / "samples.png").exists()
