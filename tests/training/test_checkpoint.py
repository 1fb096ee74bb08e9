"""Checkpoints: the newest good one is found, damage is named, a failed save leaves nothing."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dvae.errors import MachineError
from dvae.training.checkpoint import Checkpoints


def put(text: str):
    return lambda folder: (folder / "engine.bin").write_text(text)


def test_saves_and_finds_the_newest_and_keeps_so_many(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.newest() is None
    for step in (5, 10, 15):
        checkpoints.save(step, {"step": step}, put(f"engine {step}"))
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
        checkpoints.save(step, {"step": step}, put("engine" * 100))
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


def test_a_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {}, put("good"))

    def full_disk(folder: Path) -> None:
        (folder / "engine.bin").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(MachineError, match="No space left on device"):
        checkpoints.save(2, {}, full_disk)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
