"""A run's figures by the names of W&B's summary."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dvae.errors import MachineError
from dvae.tracking import figures
from dvae.tracking.metrics_log import MetricsLog

EVALUATION = {
    "sampler": {"steps": 25},
    "protocol": {"n": 200},
    "nfe": 25,
    "reconstructions": {"n": 8, "psnr": 11.5, "latent": [8]},
    "sets": {"refined": {"KID-lite0": {"mean": 0.08, "se": None, "per_seed": [0.08]}}},
    "points": {"done": True, "name": "spirals"},
}


def test_numbers_of_the_evaluation_by_their_path_and_no_settings() -> None:
    assert figures.evaluation_figures(EVALUATION) == {
        "evaluate/nfe": 25,
        "evaluate/reconstructions/n": 8,
        "evaluate/reconstructions/psnr": 11.5,
        "evaluate/sets/refined/KID-lite0/mean": 0.08,
        "evaluate/sets/refined/KID-lite0/se": None,
    }


def test_the_last_value_of_training_counts_and_the_summary_adds_to_it(tmp_path: Path) -> None:
    assert figures.run_figures(tmp_path) == {}
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step, loss in ((1, 3.0), (2, float("nan")), (3, 2.0)):
        log.append({"stage": "refiner", "step": step, "time": 1.0, "loss": loss, "grad_norm": 1 / step})
    log.append({"stage": "encoder", "step": 3, "time": 1.0, "loss": float("inf")})
    training = {
        "refiner/step": 3,
        "refiner/loss": 2.0,
        "refiner/grad_norm": 1 / 3,
        "encoder/step": 3,
        "encoder/loss": None,
    }
    assert figures.run_figures(tmp_path) == training
    assert figures.metric_history(tmp_path, "refiner/loss") == [3.0, 2.0]
    assert figures.metric_history(tmp_path, "encoder/loss") == figures.metric_history(tmp_path, "evaluate/nfe") == []
    (tmp_path / "summary.json").write_text(json.dumps({"figures": {"evaluate/nfe": 25}}), encoding="utf-8")
    assert figures.run_figures(tmp_path) == training | {"evaluate/nfe": 25}


def test_text_is_no_figure_and_what_is_not_finite_is_none(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"stage": "refiner", "step": 1, "device": "cpu", "loss": 1})
    assert figures.training_figures(tmp_path) == {"refiner/step": 1, "refiner/loss": 1}
    assert figures.metric_history(tmp_path, "refiner/device") == []
    (tmp_path / "summary.json").write_text(
        '{"figures": {"a": NaN, "b": 1e999, "c": 2, "d": null, "e": ' + "9" * 400 + "}}"
    )
    assert figures.run_figures(tmp_path) == {
        "refiner/step": 1, "refiner/loss": 1, "a": None, "b": None, "c": 2, "d": None, "e": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "{}", "null", "3", '{"figures": null}', '{"figures": []}', '{"figures": {"a": "1"}}',
        '{"figures": {"a": true}}', '{"figures": {"a": {}}}', '{"figures": {"a": 1, "a": 2}}',
        '{"figures": {}, "stages": 3}', "[" * 100_000,
        '{"figures": {}, "evaluation": {"sets": {"refined": {"KID-lite0": 3}}}}',
    ],
)  # fmt: skip
def test_a_damaged_summary_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text, encoding="utf-8")
    with pytest.raises(MachineError, match=r"summary\.json: holds no figures.*; delete it, then launch the run again$"):
        figures.run_figures(tmp_path)


@pytest.mark.parametrize(("kind", "make"), [("a folder", Path.mkdir), ("a pipe", os.mkfifo)])
def test_a_summary_that_is_no_file_is_named(tmp_path: Path, kind: str, make: Any) -> None:
    make(tmp_path / "summary.json")
    with pytest.raises(MachineError, match=rf"summary\.json: holds no figures \(is {kind}, not a file\)"):
        figures.run_figures(tmp_path)
