"""Scores while the refiner trains: those of the evaluate stage, and the same rows after a resume."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests_support import environment

from dvae.config import compose as configuration
from dvae.errors import UserError

LAUNCHES = """
import json, pathlib, shutil, sys
from dvae.tools import launch
words = sys.argv[1:]
launch.command([*words, "run=whole"])
again = pathlib.Path("again")
shutil.copytree("whole", again)
for name in ("bundle", "checkpoints/refiner/step-00000004", "checkpoints/refiner/step-00000006"):
    shutil.rmtree(again / name)
(again / "weights/denoiser.safetensors").unlink()
records = json.loads((again / "stages.json").read_text())
records = {name: record for name, record in records.items() if name not in ("refiner", "evaluate")}
(again / "stages.json").write_text(json.dumps(records))
launch.command([*words, "run=again"])
"""
"""A run, and one that goes on from step 2 of its refiner: in one process, since starting one takes longest."""


def rows(run: Path) -> list[dict[str, Any]]:
    """The refiner's rows, without what is of the clock."""
    clock = ("time", "seconds", "images_per_second")
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in clock} for row in found if row["stage"] == "refiner"]


@pytest.mark.slow
def test_scores_are_those_of_evaluation_and_survive_a_resume(tmp_path: Path, tiny: list[str]) -> None:
    words = [*tiny, "evaluate.metrics=true", "evaluate.n=24", "evaluate.n_reference=48", "evaluate.seeds=[3]"]
    words += [
        "evaluate.kid_subset_size=12",
        "evaluate.kid_subsets=5",
        "evaluate.every_steps=2",
        "train_refiner.log_every=4",
    ]
    command = [sys.executable, "-c", LAUNCHES, *words, "train_refiner.keep=9"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    whole = rows(tmp_path / "whole")
    assert [row["step"] for row in whole] == [4, 6]
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    scored = summary["evaluation"]["sets"]["refined"]
    for name in ("KID-lite0", "FID-lite0"):
        assert whole[1][name] == scored[name]["per_seed"][0]  # of the last step: what evaluation scores
        assert whole[0][name] != whole[1][name]  # the mean of those of steps 2 and 4
    assert rows(tmp_path / "again") == whole
    assert "KID-lite0 of the averaged weights" in (tmp_path / "whole" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate.every_steps=-1"], r"evaluate\.every_steps=-1: use 0 \(none\) or a number of steps"),
        (
            ["evaluate.every_steps=5", "evaluate.metrics=false", "evaluate.n=20"],
            "more than evaluate.n=20: use a smaller",
        ),
    ],
)
def test_wrong_settings_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        configuration.to_run_config(configuration.compose("train", ["recipe=demo", *words]))
