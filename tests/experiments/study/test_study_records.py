"""Files of a study that are read back, its own and the user's: what is damaged is one line."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dvae.errors import MachineError, UserError
from dvae.evaluation.protocol import EvaluationProtocol
from dvae.experiments.study import study_runs, study_spec
from dvae.experiments.study.study_spec import StudyConfig

KID = {"mean": 0.5, "se": None}
FIGURES = {"n": 10, "KID-lite0": KID}
PROTOCOL = EvaluationProtocol(
    backend="b", extractor="e", weights_sha256="w", resize="r", image_size=8, n=10, reference_split="train",
    n_reference=20, reference_sha256="s", seeds=[0, 1, 2], kid_subset_size=5, kid_subsets=5, kid_seed=1,
    sampler={"name": "ddim"}, nfe=5, packages={},
)  # fmt: skip
POINT = {"protocol": asdict(PROTOCOL), "sets": {"a": FIGURES}, "floor": {"heldout": FIGURES}, "seconds": 3.5}


@pytest.fixture
def settings(tmp_path: Path) -> StudyConfig:
    return StudyConfig(arms={"a": [], "b": []}, out=str(tmp_path / "study"))


def kept(settings: StudyConfig, text: str) -> Path:
    """The file of arm "a" at 5 steps."""
    path = Path(settings.out) / "points" / "a-0005.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


def test_a_point_comes_back_as_written(settings: StudyConfig) -> None:
    kept(settings, json.dumps(POINT))
    assert study_runs.score_point(settings, "a", 5) == POINT


@pytest.mark.parametrize(
    "text",
    [
        "{", "null", "[]", "{}", json.dumps(POINT | {"seconds": "3"}), json.dumps(POINT | {"seconds": float("nan")}),
        json.dumps({name: POINT[name] for name in POINT if name != "seconds"}), json.dumps(POINT | {"sets": {}}),
        json.dumps(POINT | {"sets": {"b": FIGURES}}), json.dumps(POINT | {"sets": {"a": {"n": 3}}}),
        json.dumps(POINT | {"floor": {"heldout": {"n": 3}}}), json.dumps(POINT | {"protocol": {"seeds": [0, 1, 2]}}),
        json.dumps(POINT | {"protocol": POINT["protocol"] | {"seeds": 3}}),
        json.dumps(POINT | {"protocol": POINT["protocol"] | {"image_size": "8"}}),
        json.dumps(POINT | {"sets": {"a": {"n": 3, "KID-lite0": 5}}}), "[" * 100_000,
    ],
)  # fmt: skip
def test_a_damaged_point_is_one_line(settings: StudyConfig, text: str) -> None:
    path = kept(settings, text)
    with pytest.raises(MachineError) as error:
        study_runs.score_point(settings, "a", 5)
    assert str(error.value).startswith(f"{path}: damaged (")
    assert str(error.value).endswith("; delete it, it will be made again")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    ["{", "null", "[]", "{}", '{"arms": []}', '{"arms": {"a": "b"}}', '{"arms": {"a": [1]}}', '{"a": 1, "a": 2}'],
)
def test_a_damaged_record_is_one_line(settings: StudyConfig, text: str) -> None:
    study_runs.claim_folder(settings)
    (Path(settings.out) / study_runs.RECORD).write_text(text)
    with pytest.raises(MachineError, match=r"study\.json: .*; its runs beside it are intact, use another out=$"):
        study_runs.claim_folder(settings)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_one_line(settings: StudyConfig, make: Any) -> None:
    kept(settings, "").unlink()
    make(Path(settings.out) / study_runs.RECORD)
    with pytest.raises(MachineError, match=r"study\.json: is a \w+, not a file"):
        study_runs.claim_folder(settings)
    make(Path(settings.out) / "points" / "a-0005.json")
    with pytest.raises(MachineError, match=r"a-0005\.json: damaged \(is a \w+, not a file\)"):
        study_runs.score_point(settings, "a", 5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a", "is not a mapping"), ("arms: [", "is not valid YAML"), ("n: 3\nn: 4", "the key 'n' is there twice"),
        ("arms: 3", "arms: "), ("arms: {a: 3}", "arms.a: "), ("arms: {a: null, b: []}", "arms.a: "),
        ("n: many", "n: Value 'many'"), ("n: [3]", "n: "), ("seeds: 3", "seeds: "), ("seeds: [a]", "seeds"),
        ("foreign: 3", "foreign: "), ("arms: {1: []}", "arms has the key 1"), ("n: ${nothing}", "n: "),
        ("arms: {'': [], b: []}", "arms: '' is not a valid folder name"), ("arms: {..: []}", "arms: '..' is not"),
        ("n: !!python/object:os.system {}", "is not valid YAML"), ("a: &a [*a]", "an alias stands for itself"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        study_spec.read_study([f"study={path}"])
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1
