"""Files of a checkpoint: what they say of themselves is checked before their numbers are read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dvae.errors import MachineError
from dvae.training.engine.fragments import SavedEngine

VALUES = torch.arange(6.0)
ENTRY = {"start": 0, "shape": [2, 3], "step": 4}


def file(folder: Path, number: int = 0, layout: Any = None, **tensors: torch.Tensor) -> Path:
    """A rank's file; names are those of `tensors` with "weight:" before them, unless they name a kind."""
    path = folder / f"rank-{number:05d}.safetensors"
    named = {key.replace("__", ":") if "__" in key else f"weight:{key}": value for key, value in tensors.items()}
    save_file(named, path, {"layout": layout if isinstance(layout, str) else json.dumps(layout)})
    return path


def test_values_come_from_whichever_files_hold_them(tmp_path: Path) -> None:
    file(tmp_path, 0, {"a": ENTRY}, a=VALUES[:4], ema__a=-VALUES[:4], buffer__b=torch.ones(2))
    file(tmp_path, 1, {"a": ENTRY | {"start": 4}}, a=VALUES[4:], ema__a=-VALUES[4:])
    saved = SavedEngine(tmp_path)
    assert (saved.shapes, saved.steps, dict(saved.kinds)) == ({"a": (2, 3)}, {"a": 4}, {"a": {"ema"}})
    assert torch.equal(saved.tensor("weight", "a"), VALUES.view(2, 3))
    assert torch.equal(saved.read("ema", "a", 3, 2), -VALUES[3:5])
    assert torch.equal(saved.buffers()["b"], torch.ones(2))
    assert saved.state_dict("weight").keys() == {"a", "b"}


@pytest.mark.parametrize(
    "layout",
    [
        "", "{", "null", "[]", "{}", '{"a": 1, "a": 2}', "[" * 100_000, {"a": 3}, {"a": {}},
        {"a": ENTRY | {"start": -1}}, {"a": ENTRY | {"start": 1}}, {"a": ENTRY | {"start": 2**80}},
        {"a": ENTRY | {"shape": 6}},
        {"a": ENTRY | {"shape": [2, -3]}}, {"a": ENTRY | {"shape": [2, 2]}}, {"a": ENTRY | {"shape": ["2", 3]}},
        {"a": ENTRY | {"step": "4"}}, {"a": ENTRY | {"step": None}}, {"b": ENTRY},
    ],
)  # fmt: skip
def test_a_layout_that_does_not_fit_is_one_line(tmp_path: Path, layout: Any) -> None:
    file(tmp_path, 0, layout, a=VALUES)
    with pytest.raises(MachineError, match="not a readable checkpoint") as error:
        SavedEngine(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: ")
    assert len(str(error.value).splitlines()) == 1


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe_in_its_place(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def without_metadata(path: Path) -> None:
    save_file({"weight:a": VALUES}, path)


def two_dimensions(path: Path) -> None:
    save_file({"weight:a": VALUES.view(2, 3)}, path, {"layout": json.dumps({"a": ENTRY})})


def another_shape(path: Path) -> None:
    file(path.parent, 1, {"a": ENTRY | {"shape": [6]}}, a=VALUES)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"\xff" * 100), cut, folder_in_its_place,
        pipe_in_its_place, without_metadata, two_dimensions, another_shape,
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line(tmp_path: Path, damage: Any) -> None:
    damage(file(tmp_path, 0, {"a": ENTRY}, a=VALUES))
    with pytest.raises(MachineError, match="not a readable checkpoint") as error:
        SavedEngine(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_no_memory_is_taken_for_values_that_are_not_there(tmp_path: Path) -> None:
    file(tmp_path, 0, {"a": {"start": 0, "shape": [2**30, 2**30], "step": 0}}, a=VALUES)
    with pytest.raises(MachineError, match=r"1152921504606846970 of 1152921504606846976 values of weight:a are not in"):
        SavedEngine(tmp_path).tensor("weight", "a")
    with pytest.raises(MachineError, match="no parameter 'b' in this checkpoint"):
        SavedEngine(tmp_path).tensor("weight", "b")


@pytest.mark.parametrize(("start", "values"), [(0, VALUES), (2, VALUES[2:]), (1, VALUES[1:3])])
def test_values_that_are_there_twice_do_not_pass_for_those_that_lack(
    tmp_path: Path, start: int, values: torch.Tensor
) -> None:
    file(tmp_path, 0, {"a": ENTRY}, a=VALUES[:4])
    file(tmp_path, 1, {"a": ENTRY | {"start": start}}, a=values)
    with pytest.raises(MachineError, match=r"are in this checkpoint more than once"):
        SavedEngine(tmp_path).tensor("weight", "a")


def test_a_folder_without_files_is_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(MachineError, match="no engine state in this checkpoint"):
            SavedEngine(folder)
