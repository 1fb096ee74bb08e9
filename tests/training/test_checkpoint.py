"""Checkpoints: the newest good one is found, damage is named, a failed save leaves nothing."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest

from dvae.errors import MachineError
from dvae.training.checkpoint import Checkpoints, Write


def put(text: str) -> Write:
    def write(folder: Path) -> list[Path]:
        (folder / "engine.bin").write_text(text)
        return [folder / "engine.bin"]

    return write


def train_on(checkpoints: Checkpoints) -> None:
    while True:
        checkpoints.check()
        time.sleep(0.01)


def fail_while_saving(checkpoints: Checkpoints, write: Write) -> None:
    with checkpoints:
        checkpoints.save(1, {}, write)
        raise MachineError("a gradient is not finite")


def save(checkpoints: Checkpoints, step: int, text: str = "engine") -> None:
    checkpoints.save(step, {"step": step}, put(text))
    checkpoints.finish()


def test_saves_and_finds_the_newest_and_keeps_so_many(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.newest() is None
    for step in (5, 10, 15):
        save(checkpoints, step, f"engine {step}")
    found = checkpoints.newest()
    assert found is not None
    assert found[1] == {"step": 15}
    assert (found[0] / "engine.bin").read_text() == "engine 15"
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["step-00000010", "step-00000015"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "remove the hashes"])
def test_a_damaged_checkpoint_is_named_and_passed_over(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (5, 10):
        save(checkpoints, step, "engine" * 100)
    victim = tmp_path / "step-00000010" / ("hashes.json" if "hashes" in damage else "engine.bin")
    data = victim.read_bytes()
    if damage == "flip":
        victim.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif damage == "truncate":
        victim.write_bytes(data[:-1])
    else:
        victim.unlink()
    with caplog.at_level(logging.WARNING, logger="dvae"):
        found = checkpoints.newest()
    assert found is not None
    assert found[1] == {"step": 5}
    assert "step-00000010 is damaged" in caplog.text
    checkpoints.drop_after(5)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


def test_every_nth_is_kept_for_good(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1, keep_every=20)
    for step in (10, 20, 30, 40, 50, 60, 70):
        save(checkpoints, step)
    assert [int(p.name.removeprefix("step-")) for p in sorted(tmp_path.iterdir())] == [20, 40, 60, 70]


def test_training_goes_on_while_it_is_written(tmp_path: Path) -> None:
    checkpoints, go_on = Checkpoints(tmp_path, keep=2), threading.Event()

    def slow(folder: Path) -> list[Path]:
        assert go_on.wait(timeout=60)
        return put("late")(folder)

    checkpoints.save(1, {"step": 1}, slow)
    checkpoints.check()
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == []
    go_on.set()
    with checkpoints:
        pass
    found = checkpoints.newest()
    assert found is not None
    assert found[1] == {"step": 1}


def test_an_error_of_the_machine_waits_for_the_save_in_progress(tmp_path: Path) -> None:
    def slow(folder: Path) -> list[Path]:
        time.sleep(0.2)
        return put("late")(folder)

    checkpoints = Checkpoints(tmp_path, keep=2)
    with pytest.raises(MachineError, match="a gradient"):
        fail_while_saving(checkpoints, slow)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_a_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)

    def full_disk(folder: Path) -> list[Path]:
        (folder / "engine.bin").write_text("half")
        raise OSError(28, "No space left on device")

    checkpoints.save(2, {}, full_disk)
    with pytest.raises(MachineError, match=r"checkpoint of step 2 .*No space left on device"):
        train_on(checkpoints)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    save(checkpoints, 3)


def test_a_mistake_in_writing_is_not_taken_for_the_machines(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"step": object()}, put("engine"))
    with pytest.raises(TypeError):
        checkpoints.finish()
    assert list(tmp_path.iterdir()) == []
