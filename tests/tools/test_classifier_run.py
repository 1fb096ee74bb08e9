"""A run with classes: labels from shards to bundle, the classifier's stage, and every mistake in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests_support import ROOT, Tool, environment

from dvae.config import compose
from dvae.errors import UserError, fold
from dvae.models import bundle, bundle_export, components
from dvae.runs.folder import Run
from dvae.tools.launch import command


@pytest.fixture(scope="module")
def guided(tiny: list[str]) -> list[str]:
    """Words for a tiny run of faces_guided."""
    words = [word for word in tiny if not word.startswith("recipe=")]
    words += ["recipe=faces_guided", "classifier.width=32", "classifier.multipliers=[1]", "classifier.blocks=1"]
    sizes = {"steps": 6, "batch": 8, "log_every": 1, "save_every": 2, "warmup": 2}
    return words + [f"train_classifier.{field}={value}" for field, value in sizes.items()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, guided: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("guided")
    words = [sys.executable, str(ROOT / "tools" / "launch.py"), *guided, f"run={folder}/run"]
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_the_stage_keeps_its_figures(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["stage"] == "classifier"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        for figure in ("loss", "accuracy"):
            by_time = [row[f"{figure}_t{i}"] for i in range(10) if f"{figure}_t{i}" in row]
            assert min(by_time) - 1e-6 <= row[figure] <= max(by_time) + 1e-6
    record = json.loads((finished / "stages.json").read_text())["classifier"]
    assert record["steps"] == 6
    assert {f"heldout_accuracy_t{i}" for i in range(10)} < record.keys()
    assert 0.0 < record["heldout_accuracy"] < 1.0
    assert "classifier: accuracy by time" in (finished / "report.html").read_text()


def test_the_bundle_holds_the_averaged_classifier(finished: Path) -> None:
    settings, made = bundle.load(finished / "bundle")
    assert settings.classes == ["laugh", "agape", "angry", "smile", "sad"]
    assert made.classifier is not None
    assert not made.classifier.training
    kept = load_file(finished / "weights" / "classifier.safetensors")
    for name, value in made.classifier.state_dict().items():
        assert torch.equal(value, kept[name]), name
    assert made.denoiser.refiner.label_emb.num_embeddings == 6
    about = json.loads((finished / "bundle" / "bundle.json").read_text())
    assert about["components"]["classifier"]["name"] == "half_unet"


def test_a_bundle_before_its_classifier_is_trained(finished: Path, tmp_path: Path) -> None:
    parts = {part: load_file(finished / "weights" / f"{part}.safetensors") for part in ("encoder", "prior", "denoiser")}
    bundle_export.export(tmp_path / "bundle", Run(finished).config(), parts)
    settings, made = bundle.load(tmp_path / "bundle")
    assert made.classifier is None
    assert settings.classifier is None
    assert made.shapes.labels == 5


@pytest.mark.slow
def test_the_stage_resumes_bit_for_bit(finished: Path, guided: list[str], tool: Tool, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    records = json.loads((copy / "stages.json").read_text())
    done = {stage: record for stage, record in records.items() if stage not in ("classifier", "evaluate")}
    (copy / "stages.json").write_text(json.dumps(done))
    (copy / "weights" / "classifier.safetensors").unlink()
    shutil.rmtree(copy / "checkpoints" / "classifier" / "step-00000006")
    resumed = tool("launch", *guided, f"run={copy}")
    assert resumed.returncode == 0, resumed.stderr
    first, second = (load_file(run / "weights" / "classifier.safetensors") for run in (finished, copy))
    for name in first:
        assert torch.equal(first[name], second[name]), name
    again = json.loads((copy / "stages.json").read_text())
    assert again["classifier"]["heldout_accuracy"] == records["classifier"]["heldout_accuracy"]


def without_classifier(words: list[str]) -> list[str]:
    return [word for word in words if not word.startswith("classifier.")]


MISTAKES = {
    "data.label=muoth": "data.label=muoth: the images have no such attribute: did you mean 'mouth'?",
    "data.label=''": "classes need the name of the image attribute that holds the class: set data.label=NAME",
    "classes=[laugh,agape]": "is not one of the classes laugh, agape: name every value",
    "classes=[laugh,laugh]": "classes: 'laugh' occurs more than once",
    "classes=[]": "data.label=mouth needs the list of its values",
    "train_classifier.micro_batches=3": "batch 8 does not divide",
    "train_classifier.steps=0": "train_classifier.steps=0: use 1 or more",
    "classifier.heads=5": "classifier.heads 5 does not divide 32 channels",
    "classifier=half_unett": "unknown classifier 'half_unett': did you mean 'half_unet'?",
    "classifier=null": "stages: classifier trains a classifier, and classifier=null",
    "schedule=null": "schedule=null: a run needs a schedule",
}


@pytest.mark.parametrize("word", MISTAKES)
def test_a_wrong_word_is_one_line(
    word: str, guided: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = without_classifier(guided) if word.startswith("classifier=") else guided
    with pytest.raises(UserError) as caught:
        command([*words, word])
    assert MISTAKES[word] in fold(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["classifier=half_unet"], "classifier=half_unet needs two or more classes"),
        (["denoiser.condition_label=true"], "denoiser.condition_label=true needs classes"),
        (["classes=[a,b]"], "classes need the name of the image attribute"),
    ],
)
def test_a_run_without_classes(
    words: list[str], says: str, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        command([*tiny, *words])
    assert says in fold(caught.value)
    assert not list(tmp_path.iterdir())


def test_labels_are_checked_against_shards_that_exist(finished: Path, guided: list[str]) -> None:
    for word, says in (("data.label=hat", "no such attribute"), ("classes=[laugh,agape,angry,smile]", "'sad' is not")):
        with pytest.raises(UserError) as caught:
            command([*guided, word, f"data.shards={finished}/shards", "dry_run=true"])
        assert says in fold(caught.value)


def test_the_refiner_alone_may_be_trained_with_classes(
    guided: list[str], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*without_classifier(guided), "classifier=null", "stages=[refiner]", f"data.shards={finished}/shards"]
    command([*words, "dry_run=true"])
    said = capsys.readouterr().out
    assert "classifier: null" in said
    assert "refiner: 0.2M parameters" in said


@pytest.mark.parametrize("told", [True, False])
def test_only_a_refiner_that_is_told_the_class_embeds_it(told: bool, guided: list[str]) -> None:
    word = f"denoiser.condition_label={str(told).lower()}"
    made = components.build_models_on_meta(compose.to_run_config(compose.compose("train", [*guided, word])))
    assert (made.denoiser.refiner.label_emb is not None) == told
    assert made.shapes.labels == 5
