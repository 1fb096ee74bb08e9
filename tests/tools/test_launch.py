"""The launch command as a user meets it: a whole tiny run, and every mistake in one line with exit status 2."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from tests_support import ROOT, Tool, environment

from dvae.errors import MachineError, UserError, fold
from dvae.tools import launch


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("dvae: error: ")
    return lines[0]


Refusal = Callable[..., str]


@pytest.fixture
def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refusal:
    """The one line by which a tool refuses words; in this process, to be quick. One test sees the exit status too."""

    def run(name: str, *words: str) -> str:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError) as caught:
            importlib.import_module(f"dvae.tools.{name}").command(list(words))
        return fold(caught.value)

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """A whole tiny run."""
    import sys

    folder = tmp_path_factory.mktemp("finished")
    command = [sys.executable, str(ROOT / "tools" / "launch.py"), *tiny, f"run={folder}/run"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    promised = (
        "config.yaml", "metrics.jsonl", "summary.json", "report.html", "samples.png", "reconstructions.png",
        "bundle/model.safetensors", "bundle/config.yaml", "bundle/bundle.json", "shards/manifest.json",
    )  # fmt: skip
    for name in promised:
        assert (finished / name).stat().st_size > 0, name
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in rows] == [(s, i) for s in ("encoder", "refiner") for i in range(1, 7)]
    assert not list(finished.rglob(".*.tmp*"))


def test_a_finished_run_says_so(finished: Path, tool: Tool, tiny: list[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    done = tool("launch", *tiny, f"run={finished}")
    assert done.returncode == 0, done.stderr
    assert "is finished" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}


def test_sampling_is_keyed_per_image(finished: Path, tool: Tool, tmp_path: Path) -> None:
    for n in (3, 8):
        done = tool("sample", f"run={finished}/bundle", f"n={n}", f"out={n}.png", "sampler=ddpm", "sampler.steps=3")
        assert done.returncode == 0, done.stderr
        assert "3 network evaluations" in done.stdout
    few, many = (np.asarray(Image.open(tmp_path / f"{n}.png")).astype(int) for n in (3, 8))
    assert np.abs(few[:16, : 6 * 17 - 1] - many[:16, : 6 * 17 - 1]).max() <= 1


def test_dry_run_prints_and_writes_nothing(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    launch.command([*tiny, "dry_run=true"])
    said = capsys.readouterr().out
    assert "stages: shards -> encoder -> prior -> refiner -> evaluate" in said
    assert "encoder: 0.0M parameters, 6 steps of 8 images" in said
    assert "refiner: 0.2M parameters" in said
    assert "shards: 2 in" in said
    assert not list(tmp_path.iterdir())


def test_help_names_recipes_and_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        launch.command(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "demo" in said
    assert "avatars" in said
    assert "schedule" in said


MISTAKES = {
    "recipe=dmeo": "unknown recipe 'dmeo': did you mean 'demo'?",
    "schedule=cosin": "unknown schedule 'cosin': did you mean 'cosine'?",
    "sampler.step=5": "unknown field 'sampler.step': did you mean 'steps'?",
    "+sampler.setps=5": "did you mean 'steps'?",
    "train_encoder.stepps=5": "unknown field 'train_encoder.stepps': did you mean 'steps'?",
    "sampler.steps=many": "sampler.steps",
    "sampler.spacing=cubic": "sampler.spacing",
    "train_refiner.lr=-1": "train_refiner.lr=-1",
    "stages=[encodr]": "unknown stage 'encodr': did you mean 'encoder'?",
    "plugins=[no_such_module]": "module 'no_such_module' cannot be imported",
    "train_encoder.micro_batches=3": "batch 8 does not divide",
    "image_size=15": "15",
    "refiner.heads=5": "refiner.heads",
    "evaluate.metrics=true": "evaluate.kid_subset_size=100 is more than evaluate.n=8",
    "just-a-word": "just-a-word",
}


@pytest.mark.parametrize("word", MISTAKES)
def test_a_wrong_word_is_one_line(word: str, tiny: list[str], tmp_path: Path, refusal: Refusal) -> None:
    assert MISTAKES[word] in refusal("launch", *tiny, word)
    assert not list(tmp_path.iterdir())


def test_a_wrong_word_ends_with_status_2(tool: Tool, tiny: list[str], tmp_path: Path) -> None:
    assert "did you mean 'cosine'" in refused(tool("launch", *tiny, "schedule=cosin"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["missing", "empty", "no images", "text called .png"])
def test_a_folder_without_images(content: str, refusal: Refusal, tiny: list[str], tmp_path: Path) -> None:
    images = tmp_path / "images"
    if content != "missing":
        images.mkdir()
    if content == "no images":
        (images / "notes.txt").write_text("no picture")
    if content == "text called .png":
        for number in range(20):
            (images / f"{number}.png").write_text("no picture")
    words = [word for word in tiny if not word.startswith("source.")]
    line = refusal("launch", *words, "source=folder", f"source.path={images}")
    assert str(images) in line or "0.png" in line
    assert not (tmp_path / "runs").exists()


def test_shards_of_another_size(finished: Path, refusal: Refusal, tiny: list[str], tmp_path: Path) -> None:
    line = refusal("launch", *tiny, f"data.shards={finished}/shards", "image_size=32", "encoder.resolutions=[16,4,1]")
    assert "16" in line
    assert "32" in line
    assert not (tmp_path / "runs").exists()


def test_a_run_of_another_recipe_or_setting(finished: Path, refusal: Refusal, tiny: list[str]) -> None:
    other = [word for word in tiny if word != "recipe=demo"]
    assert "belongs to recipe 'demo'" in refusal("launch", "recipe=avatars", *other, f"run={finished}")
    assert "made with train_refiner.lr=" in refusal("launch", *tiny, f"run={finished}", "train_refiner.lr=1")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that cannot be written: by its mode, or, for root, whom modes do not bind, on a read-only mount."""
    folder = tmp_path / "locked"
    folder.mkdir()
    if os.geteuid():
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
        yield folder
        folder.chmod(stat.S_IRWXU)
        return
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"root without the right to mount cannot make a read-only folder: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_read_only_run_folder(read_only: Path, refusal: Refusal, tiny: list[str]) -> None:
    assert "cannot be written" in refusal("launch", *tiny, f"run={read_only}")
    assert "cannot be written" in refusal("launch", *tiny, f"run={read_only}/run")


def test_a_folder_that_is_no_run(refusal: Refusal, tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert "is not a run" in refusal("launch", *tiny, "run=mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("fault", ["config", "bytes", "missing", "not a bundle"])
def test_a_bundle_that_is_not_whole(fault: str, finished: Path, refusal: Refusal, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(finished / "bundle", bundle)
    weights = bundle / "model.safetensors"
    if fault == "config":
        text = (bundle / "config.yaml").read_text()
        (bundle / "config.yaml").write_text(text.replace("width: 32", "width: 64"))
        said = "config.yaml does not match the hash in bundle.json"
    elif fault == "bytes":
        tensors = load_file(weights)
        first = sorted(tensors)[0]
        save_file(tensors | {first: tensors[first] + 1}, weights)
        said = "does not match the hash"
    elif fault == "missing":
        weights.unlink()
        said = "model.safetensors is missing"
    else:
        bundle = tmp_path / "nothing"
        said = "no such run or bundle"
    assert said in refusal("sample", f"run={bundle}", "n=2", "out=x.png")
    assert not (tmp_path / "x.png").exists()


def copied(finished: Path, folder: Path) -> Path:
    """A copy of the finished run, as its own folder."""
    shutil.copytree(finished, folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(str(finished), str(folder)))
    return folder


def test_a_flipped_bit_in_the_weights_of_a_finished_stage_is_found(
    finished: Path, tiny: list[str], tool: Tool, tmp_path: Path
) -> None:
    run = copied(finished, tmp_path / "run")
    bundle = (run / "bundle" / "model.safetensors").read_bytes()
    weights = run / "weights" / "encoder.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(bytes(data))
    step = max(int(path.name[5:]) for path in (run / "checkpoints" / "refiner").glob("step-*"))
    for done in (
        tool("launch", *tiny, f"run={run}", "evaluate.n=9"),
        tool("export", f"run={run}", f"step={step}", "out=exported"),
    ):
        assert done.returncode == 1
        assert "encoder.safetensors does not match its hash in" in done.stderr.strip().splitlines()[-1]
    assert (run / "bundle" / "model.safetensors").read_bytes() == bundle
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "run folder of format 1 (it has no run.json), this program reads 2: dvae 0.1 reads it"),
        ('{"format": 9, "dvae": "9.0"}', "run folder format 9, this program reads 2: a newer dvae wrote it"),
        ('{"format": "2", "dvae": "0.2.0"}', "run.json: format: Input should be a valid integer"),
    ],
)
def test_a_run_folder_of_another_format_is_refused(
    finished: Path, tiny: list[str], tmp_path: Path, content: str | None, said: str
) -> None:
    run = copied(finished, tmp_path / "run")
    (run / "run.json").unlink()
    if content is not None:
        (run / "run.json").write_text(content)
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises((UserError, MachineError)) as refused:
        launch.command([*tiny, f"run={run}", "evaluate.n=9"])
    assert said in str(refused.value)
    assert sorted(path.name for path in run.iterdir()) == before
