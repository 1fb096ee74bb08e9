"""tools/bench.py trainer: all loops run on a small run, and the ratios are those of what was measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests_support import ROOT, environment

from dvae.errors import UserError
from dvae.experiments.bench import trainer_bench
from dvae.tools.bench import command


@pytest.mark.slow
def test_every_loop_takes_its_turns(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*tiny, "stages=[shards,encoder]", "train_encoder.steps=2", f"run={tmp_path / 'run'}"]
    launch = [sys.executable, str(ROOT / "tools" / "launch.py"), *words]
    subprocess.run(launch, env=environment(), check=True, capture_output=True)
    command(["trainer", f"run={tmp_path / 'run'}", "steps=2"])
    printed = capsys.readouterr().out
    for name in ("bare torch", "bare DeepSpeed", "trainer", "trainer over bare DeepSpeed", "stall over a step"):
        assert f"{name}: " in printed


def test_ratios_are_medians_over_the_turns(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {"bare torch": [1.0, 1.0, 4.0], "bare DeepSpeed": [2.0, 2.0, 4.0], "trainer": [2.0, 3.0, 8.0]}
    figures = trainer_bench.report(seconds, blocked=0.3, total=0.6)
    expected = {"trainer over bare DeepSpeed": 1.5, "DeepSpeed over bare torch": 2.0, "stall over a step": 0.1}
    assert figures == pytest.approx(expected | {"stall over the whole save": 0.5})


def test_a_run_that_is_none_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run is there"):
        command(["trainer", f"run={tmp_path}"])
