"""Results and features that are read back: what is damaged is one line."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_protocol import PROTOCOL

from dvae.errors import MachineError, UserError
from dvae.evaluation import features, sample_scores, tables
from dvae.evaluation.metrics import Features

FIGURE: dict[str, Any] = {"mean": 0.5, "se": None, "per_seed": [0.5]}
FIGURES: dict[str, Any] = {"n": 10, "n_reference": 20, "KID-lite0": FIGURE}
RESULT: dict[str, Any] = {
    "protocol": asdict(PROTOCOL), "sets": {"refined": FIGURES}, "floor": {"heldout": FIGURES}, "seconds": 3,
}  # fmt: skip


def protocol(**changes: Any) -> str:
    return json.dumps(RESULT | {"protocol": RESULT["protocol"] | changes})


def sets(figures: Any) -> str:
    return json.dumps(RESULT | {"sets": {"refined": figures}})


DAMAGED = [
    "{", "null", "[]", "[" * 100_000, '{"sets": 1, "sets": 2}', json.dumps(RESULT | {"sets": []}),
    json.dumps(RESULT | {"sets": {}}), json.dumps(RESULT | {"floor": {"heldout": 3}}), sets({}), sets({"n": 3.5}),
    sets(FIGURES | {"n": FIGURE}), sets(FIGURES | {"FID": 3}), sets(FIGURES | {"FID": {"mean": 1}}),
    sets(FIGURES | {"FID": {"mean": "1", "se": None}}), sets(FIGURES | {"FID": {"mean": 1, "se": [1]}}),
    protocol(n="10"), protocol(n=None), protocol(seeds=3), protocol(sampler="ddim"), protocol(nfe="50"),
    protocol(packages=[]), protocol(foreign=1), protocol(nfe=float("inf")),
    json.dumps(RESULT | {"protocol": {"n": 3}}),
]  # fmt: skip
every_damage = pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))


def test_a_result_comes_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(RESULT))
    assert sample_scores._read(path) == tables.read(str(path)) == RESULT
    path.write_text(json.dumps({"recipe": "demo", "evaluation": RESULT}))
    assert tables.read(str(path)) == RESULT


@every_damage
def test_a_damaged_result_that_is_kept_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(MachineError, match=r"result\.json: damaged \(.*\); delete it, it will be made again$") as error:
        sample_scores._read(path)
    assert len(str(error.value).splitlines()) == 1


@every_damage
def test_a_damaged_result_that_the_user_names_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        tables.comparison([str(path), str(path)])
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_one_line(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "result.json"
    make(path)
    with pytest.raises(UserError, match=r"compare: .*, not a file: name results of tools/evaluate\.py"):
        tables.read(str(path))
    with pytest.raises(MachineError, match=r"not a file\); delete it"):
        sample_scores._read(path)
    with pytest.raises(UserError, match="cannot be read"):
        tables.read(str(tmp_path / "none"))


def test_names_of_sets_cannot_move_the_cursor(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(RESULT | {"sets": {"a\x1b[2J\nb": FIGURES}}))
    table = tables.comparison([str(path), str(path)])
    assert r"a\x1b[2J b" in table
    assert all(line.isprintable() for line in table.splitlines())


def kept(folder: Path) -> Path:
    """Where the features of "x" are kept."""
    made = Features(torch.ones(3, 4), torch.zeros(3, 5))
    features.cached("x", folder, lambda: made, lambda n: None)
    (path,) = folder.iterdir()
    return path


def test_features_come_back_as_they_were(tmp_path: Path) -> None:
    kept(tmp_path)
    told: list[int] = []
    found = features.cached("x", tmp_path, lambda: pytest.fail("made again"), told.append)
    assert torch.equal(found.pooled, torch.ones(3, 4))
    assert found.logits is not None
    assert told == [3]


def vast(path: Path) -> None:
    """A file whose header claims 2^60 numbers."""
    header = json.dumps({"pooled": {"dtype": "F32", "shape": [2**30, 2**30], "data_offsets": [0, 2**62]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"nothing at all"),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.unlink() or path.mkdir(),
        lambda path: path.unlink() or os.mkfifo(path),
        lambda path: save_file({"logits": torch.zeros(3, 4)}, path),
        lambda path: save_file({"pooled": torch.zeros(3)}, path),
        lambda path: save_file({"pooled": torch.zeros(3, 4, dtype=torch.int64)}, path),
        lambda path: save_file({"pooled": torch.zeros(3, 4), "logits": torch.zeros(2, 4)}, path),
        lambda path: save_file({"pooled": torch.zeros(3, 4), "more": torch.zeros(3, 4)}, path),
        vast,
    ],
)
def test_damaged_features_are_one_line(tmp_path: Path, damage: Any) -> None:
    path = kept(tmp_path)
    damage(path)
    with pytest.raises(MachineError, match=r": damaged \(.*\); delete it, it will be made again$") as error:
        features.cached("x", tmp_path, lambda: pytest.fail("made again"), lambda n: None)
    assert len(str(error.value).splitlines()) == 1
