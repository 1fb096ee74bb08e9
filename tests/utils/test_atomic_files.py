"""Files and folders that are complete or absent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dvae.errors import MachineError
from dvae.tracking.metrics_log import MetricsLog
from dvae.utils import atomic_files


def test_a_failed_write_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic_files.write_json(path, {"kept": 1})

    def broken(aside: Path) -> None:
        aside.write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        atomic_files.write_file(path, broken)
    assert '"kept": 1' in path.read_text()
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_takes_the_place_of_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    for text in ("first", "second"):
        with atomic_files.new_folder(path) as aside:
            (aside / f"{text}.txt").write_text(text)

    def broken() -> None:
        with atomic_files.new_folder(path) as aside:
            (aside / "third.txt").write_text("third")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        broken()
    assert [item.name for item in path.iterdir()] == ["second.txt"]
    assert [item.name for item in tmp_path.iterdir()] == ["bundle"]


def test_leftovers_of_a_kill_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".bundle.abcd1234.tmp", ".bundle.abcd1234.old"):
        (tmp_path / name / "inner").mkdir(parents=True)
    for name in (".samples.png.abcd1234.tmp.png", ".lock", "samples.png"):
        (tmp_path / name).write_text("")
    atomic_files.remove_leftovers(tmp_path)
    assert sorted(item.name for item in tmp_path.iterdir()) == [".lock", "samples.png"]


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    lock, refusal = tmp_path / ".lock", MachineError("held")
    assert not atomic_files.is_locked(lock)
    with atomic_files.locked(lock, refusal):
        assert atomic_files.is_locked(lock)
        with pytest.raises(MachineError, match="held"), atomic_files.locked(lock, refusal):
            pass
    assert not atomic_files.is_locked(lock)


def test_what_a_lock_or_log_links_to_is_left_alone(tmp_path: Path) -> None:
    """A stranger's run folder could name any file of the user's as its lock."""
    (tmp_path / "mine").write_text("precious")
    for name in (".lock", "metrics.jsonl"):
        (tmp_path / name).symlink_to("mine")
    with pytest.raises(OSError, match="symbolic link"), atomic_files.locked(tmp_path / ".lock", MachineError("held")):
        pass
    with pytest.raises(OSError, match="symbolic link"):
        atomic_files.is_locked(tmp_path / ".lock")
    with pytest.raises(MachineError, match="cannot be written"):
        MetricsLog(tmp_path / "metrics.jsonl").append({"stage": "encoder", "step": 1})
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize(("kind", "make"), [("a pipe", os.mkfifo), ("a folder", Path.mkdir)])
def test_a_lock_that_is_no_file_is_one_line(tmp_path: Path, kind: str, make: Callable[[Path], None]) -> None:
    make(tmp_path / ".lock")
    with pytest.raises(MachineError, match=rf"\.lock: is {kind}, not a file"):
        atomic_files.is_locked(tmp_path / ".lock")
    with pytest.raises((MachineError, OSError)), atomic_files.locked(tmp_path / ".lock", MachineError("held")):
        pass
