"""The record of damaged images: it is added to, and a record that is damaged itself is one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dvae.data.shards.reader import Shards
from dvae.errors import MachineError
from dvae.training.resilience.damage_record import DAMAGED, load_damaged, record_damage


def test_a_record_of_damage_is_added_to(folder: Path, tmp_path: Path):
    shards = Shards(folder)
    shards.add_damaged({})
    record_damage(tmp_path, shards)
    assert not (tmp_path / DAMAGED).exists()
    for index in (3, 2):
        other = Shards(folder, max_bad_fraction=0.1)
        other.add_damaged({index: f"file:{index}"})
        record_damage(tmp_path, other)
    assert load_damaged(tmp_path, "train") == {2: "file:2", 3: "file:3"}
    (tmp_path / DAMAGED).write_text("{")
    with pytest.raises(MachineError, match=r"damaged\.json cannot be read .*: remove it"):
        load_damaged(tmp_path, "train")


DAMAGE_RECORDS = [
    "", "[]", "7", '{"train": []}', '{"train": {"x": "y"}}', '{"train": {"1": 2}}', '{"train": {"1.5": "y"}}',
    '{"train": {}, "train": {}}', "[" * 10**5, '{"train": {"' + "9" * 5000 + '": "y"}}',
]  # fmt: skip


@pytest.mark.parametrize("text", DAMAGE_RECORDS)
def test_a_record_of_damage_that_is_none(tmp_path: Path, text: str):
    (tmp_path / DAMAGED).write_text(text)
    with pytest.raises(MachineError, match=r"damaged\.json cannot be read .*: remove it") as error:
        load_damaged(tmp_path, "train")
    assert "\n" not in str(error.value)


@pytest.mark.timeout(10)
def test_a_record_of_damage_that_is_no_file(tmp_path: Path):
    path = tmp_path / DAMAGED
    for make in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path)):
        make(path)
        with pytest.raises(MachineError, match=r"damaged\.json cannot be read .*: remove it"):
            load_damaged(tmp_path, "train")
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_record_of_damage_of_other_shards_is_named(folder: Path, tmp_path: Path):
    (tmp_path / DAMAGED).write_text('{"train": {"40": "x"}}')
    with pytest.raises(MachineError, match=r"image 40 is recorded as damaged, but .* has 40 images"):
        Shards(folder).add_damaged(load_damaged(tmp_path, "train"))
