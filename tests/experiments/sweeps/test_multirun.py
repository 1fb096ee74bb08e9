"""tools/launch.py --multirun: Hydra's own expansion, a folder for each run."""

from __future__ import annotations

import pytest
from tests_support import Tool

from dvae.errors import MachineError, UserError
from dvae.experiments.sweeps import multirun


def test_every_combination_in_hydras_order() -> None:
    jobs = multirun.expand(["recipe=demo", "seed=1,2", "train_refiner.lr=1e-3,1e-4", "refiner.multipliers=[1,2]"])
    assert [job[1:3] for job in jobs] == [
        ["seed=1", "train_refiner.lr=0.001"], ["seed=1", "train_refiner.lr=0.0001"],
        ["seed=2", "train_refiner.lr=0.001"], ["seed=2", "train_refiner.lr=0.0001"],
    ]  # fmt: skip
    assert {job[0] for job in jobs} == {"recipe=demo"}
    assert {job[3] for job in jobs} == {"refiner.multipliers=[1,2]"}


def test_runs_that_would_share_a_folder_get_one_each() -> None:
    jobs = multirun.with_folders(multirun.expand(["recipe=demo", "seed=1,2", "run=there"]))
    assert jobs == [["recipe=demo", "seed=1", "run=there/0"], ["recipe=demo", "seed=2", "run=there/1"]]
    named = multirun.expand(["recipe=demo", "seed=1,2", "run=there/${seed}"])
    assert multirun.with_folders(named) == named


def test_the_last_runs_mistake_is_found_before_the_first_is_trained() -> None:
    with pytest.raises(UserError, match="unknown refiner 'unett'"):
        multirun.with_folders(multirun.expand(["recipe=demo", "refiner=unet_demo,unett"]))
    with pytest.raises(UserError, match="--multirun: ") as error:
        multirun.expand(["seed=(1"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("status", "ours"), [(1, 1), (143, 143), (-9, 137)])
def test_the_first_failure_ends_it_with_its_status(monkeypatch: pytest.MonkeyPatch, status: int, ours: int) -> None:
    started: list[str] = []

    def fake(overrides: list[str]) -> int:
        started.append(overrides[-1])
        return status if len(started) == 2 else 0

    monkeypatch.setattr(multirun, "launch", fake)
    with pytest.raises(MachineError, match=f"^run 2 of 3 ended with exit status {status}: recipe=demo seed=2") as error:
        multirun.run(["recipe=demo", "seed=1,2,3", "run=there"])
    assert error.value.exit_status == ours
    assert started == ["run=there/0", "run=there/1"]


@pytest.mark.slow
def test_the_command_line_understands_it(tool: Tool) -> None:
    done = tool("launch", "--multirun", "recipe=toy2d", "process=vp,psld", "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert "run: runs/toy2d/vp" in done.stdout
    assert "run: runs/toy2d/psld" in done.stdout
    assert done.stdout.count("dry run: nothing was written") == 2
