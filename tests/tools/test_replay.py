"""tools/replay.py on bundles of real runs: the same values are not finite again, in one process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests_support import Tool

from dvae.config import compose
from dvae.errors import UserError
from dvae.runs import replay
from dvae.runs.replay import ReplayResult
from dvae.tools.replay import command
from dvae.training.resilience import nonfinite


def bundle_of(tool: Tool, words: list[str], run: Path) -> str:
    """Run until a step is not finite; returns its replay bundle, as the last line names it."""
    done = tool("launch", *words, f"run={run}")
    assert done.returncode == 1, done.stderr
    line = done.stderr.splitlines()[-1]
    folder = line.partition("bundle=")[2].partition(")")[0]
    assert (Path(folder) / "weights.safetensors").exists(), line
    return folder


def values(folder: str, kind: str) -> dict[str, float]:
    return {name: float(value) for name, value in json.loads((Path(folder) / "record.json").read_text())[kind].items()}


@pytest.mark.slow
def test_a_refiners_step_is_reproduced_and_mended_weights_are_not(tool: Tool, tiny: list[str], tmp_path: Path) -> None:
    folder = bundle_of(tool, [*tiny, "train_refiner.lr=1e30"], tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    seen = tool("replay", f"bundle={folder}")
    assert seen.returncode == 0, seen.stderr
    assert seen.stdout.splitlines()[-1].startswith("reproduced: the same ")
    rows = {line.split()[0]: line.split()[1:] for line in seen.stdout.splitlines() if len(line.split()) == 3}
    for name in values(folder, "figures") | values(folder, "gradient_norms"):
        assert rows[name][0] == rows[name][1], name  # one rank then and now: the same digits
    assert any(name.startswith("loss_t") for name in rows)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before

    weights = load_file(Path(folder) / "weights.safetensors")
    save_file({name: value.clamp(-0.1, 0.1) for name, value in weights.items()}, Path(folder) / "weights.safetensors")
    assert (
        tool("replay", f"bundle={folder}").stdout.splitlines()[-1].startswith("not reproduced: every value is finite")
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["launcher=processes", "launcher.ranks=2", "train_encoder.micro_batches=2", "train_encoder.zero_stage=2"],
        ["encoder=kl_gan", "encoder.channels=[8,8]", "encoder.groups=4", "encoder.discriminator_width=8",
         "encoder.discriminator_layers=2", "encoder.discriminator_start=0"],
    ],
)  # fmt: skip
def test_an_encoders_step_is_reproduced(words: list[str], tool: Tool, tiny: list[str], tmp_path: Path) -> None:
    plain = [word for word in tiny if "kl_gan" not in words[0] or not word.startswith("encoder.")]
    folder = bundle_of(tool, [*plain, *words, "train_encoder.lr=1e30", "stages=[shards,encoder]"], tmp_path / "run")
    seen = tool("replay", f"bundle={folder}")
    assert seen.returncode == 0, seen.stderr
    assert seen.stdout.splitlines()[-1].startswith("reproduced: the same ")


def test_what_is_no_bundle_is_refused() -> None:
    for words, said in (
        (["shards=x"], "bundle= is not set"),
        (["bundle=nowhere"], "bundle=nowhere is no replay bundle"),
    ):
        with pytest.raises(UserError, match=said):
            command(words)


RECORD: dict[str, Any] = {
    "stage": "encoder", "step": 3, "seed": 0, "world_size": 2, "micro_batches": 1, "samples": [0, 1], "indices": [5, 6],
    "figures": {"loss": "nan", "kl": 1.5}, "gradient_norms": {"a": "inf", "b": "-inf", "c": 2},
    "not_finite": {"figures": []},
}  # fmt: skip


def test_a_record_comes_back_as_written(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(json.dumps(RECORD))
    assert nonfinite.read_record(tmp_path) == RECORD


DAMAGED = [
    "", "{", "null", "[]", "{}", '{"step": 1, "step": 2}', "[" * 100_000, "\xff",
    *(json.dumps({key: RECORD[key] for key in RECORD if key != name}) for name in RECORD),
    *(
        json.dumps(RECORD | change)
        for change in (
            {"stage": 3}, {"stage": "../encoder"}, {"stage": "evaluate"}, {"stage": "encoder-" + "9" * 50}, {"step": 0},
            {"step": "3"}, {"step": 10**30}, {"world_size": 0}, {"world_size": 2**62}, {"micro_batches": 3},
            {"samples": []}, {"samples": [0.5, 1]}, {"samples": 3}, {"samples": [0]}, {"indices": [5]},
            {"figures": []}, {"figures": {"loss": "big"}}, {"figures": {"loss": None}}, {"gradient_norms": {"a": [1]}},
            {"not_finite": ["a"]}, {"not_finite": {"figures": "a"}},
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_record_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_text(text, encoding="latin-1")
    with pytest.raises(
        UserError, match=r"is no replay bundle \(.*record\.json: .*\): name a folder nonfinite-"
    ) as error:
        command([f"bundle={tmp_path}"])
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_record_that_is_no_file_is_one_line(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "record.json")
    with pytest.raises(UserError, match=r"record\.json: is a \w+, not a file"):
        command([f"bundle={tmp_path}"])


@pytest.mark.parametrize(
    "change", [{"stage": "distil-4"}, {"samples": [0, 1, 2, 3], "indices": [0, 1, 2, 3]}, {"step": 10**9}]
)
def test_a_record_of_another_run_is_refused(tiny: list[str], change: dict[str, Any]) -> None:
    settings = compose.to_run_config(compose.compose("train", [*tiny, "train_encoder.batch=2", "run=runs/mine"]))
    replay.check_same_run(settings, RECORD, Path("there"))
    with pytest.raises(UserError, match=r"bundle=there: step .* does not belong to the run that contains it"):
        replay.check_same_run(settings, RECORD | change, Path("there"))


def test_the_verdict_compares_what_is_not_finite() -> None:
    def seen(*names: str) -> dict[str, dict[str, list[str]]]:
        return {"not_finite": {"figures": [], "gradient_norms": list(names)}}

    assert ReplayResult(seen("a", "b"), seen("b", "a"), "").summary == "reproduced: the same 2 values are not finite"
    assert ReplayResult(seen("a"), seen(), "").summary.startswith("not reproduced")
    part = ReplayResult(seen("a", "b"), seen("b", "c"), "").summary
    assert part == "reproduced in part: 1 of 2 values are not finite again; then only: a; now only: c"
