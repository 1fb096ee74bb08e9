"""Files and folders that are complete or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from dvae import files


def test_a_failed_write_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"kept": 1})

    def broken(aside: Path) -> None:
        aside.write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        files.write_file(path, broken)
    assert '"kept": 1' in path.read_text()
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_takes_the_place_of_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    for text in ("first", "second"):
        with files.new_folder(path) as aside:
            (aside / f"{text}.txt").write_text(text)

    def broken() -> None:
        with files.new_folder(path) as aside:
            (aside / "third.txt").write_text("third")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        broken()
    assert [item.name for item in path.iterdir()] == ["second.txt"]
    assert [item.name for item in tmp_path.iterdir()] == ["bundle"]


def test_leftovers_of_a_kill_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".bundle.abc.tmp", ".bundle.abc.old"):
        (tmp_path / name / "inner").mkdir(parents=True)
    for name in (".samples.png.abc.tmp.png", ".lock", "samples.png"):
        (tmp_path / name).write_text("")
    files.remove_leftovers(tmp_path)
    assert sorted(item.name for item in tmp_path.iterdir()) == [".lock", "samples.png"]
