"""Checkpoints: the newest good one is found, damage is named, a failed save leaves nothing."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dvae.errors import MachineError
from dvae.training.resilience.checkpoint import Checkpoints, WriteFiles
from dvae.utils import atomic_files


def put(text: str) -> WriteFiles:
    def write(folder: Path) -> list[Path]:
        (folder / "engine.bin").write_text(text)
        return [folder / "engine.bin"]

    return write


def train_on(checkpoints: Checkpoints) -> None:
    while True:
        checkpoints.check()
        time.sleep(0.01)


def fail_while_saving(checkpoints: Checkpoints, write: WriteFiles) -> None:
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


def reseal(folder: Path, **changed: str) -> None:
    """Change files and give the hashes of what is there now: as a stranger could."""
    for name, text in changed.items():
        (folder / name.replace("_json", ".json")).write_text(text)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    hashes = {name: atomic_files.sha256(folder / name) for name in names if name != "hashes.json"}
    (folder / "hashes.json").write_text(json.dumps(hashes))


def listed(folder: Path, name: str, digest: str | None = None) -> None:
    """List one more file in hashes.json, with its own hash."""
    hashes = json.loads((folder / "hashes.json").read_text())
    hashes[name] = digest or atomic_files.sha256(folder / name)
    (folder / "hashes.json").write_text(json.dumps(hashes))


def outside(folder: Path) -> None:
    (folder.parent / "elsewhere").write_text("secret")
    listed(folder, "../elsewhere")


def absolute(folder: Path) -> None:
    listed(folder, "/etc/hostname")


def linked(folder: Path) -> None:
    (folder.parent / "elsewhere").write_text("secret")
    (folder / "link").symlink_to(folder.parent / "elsewhere")
    listed(folder, "link")


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def loop(folder: Path) -> None:
    (folder / "more").mkdir()
    (folder / "more" / "again").symlink_to(folder)


def moved(folder: Path) -> None:
    folder.rename(folder.with_name("other"))
    folder.symlink_to(folder.with_name("other"))


def endless_weights(folder: Path) -> None:
    save_file({"a": torch.zeros(2)}, folder / "more.safetensors")
    os.truncate(folder / "more.safetensors", 2**40)
    listed(folder, "more.safetensors", "ab")


def file_in_its_place(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("nothing")


STATE = {"step": 10, "seconds": 1.5, "sums": {"loss": [1.0, 2.0]}, "window_seconds": 0.5, "skipped": 1, "others": []}
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "not json": (lambda folder: (folder / "hashes.json").write_text("{"), "hashes.json: is not valid JSON"),
    "a list": (lambda folder: (folder / "hashes.json").write_text("[]"), "hashes.json: "),
    "a number": (lambda folder: (folder / "hashes.json").write_text('{"engine.bin": 3}'), "hashes.json: engine.bin"),
    "twice": (lambda folder: (folder / "hashes.json").write_text('{"a": "", "a": ""}'), "there twice"),
    "nothing": (lambda folder: (folder / "hashes.json").write_text("{}"), "is not listed in hashes.json"),
    "a pipe": (replaced("hashes.json", os.mkfifo), "hashes.json: is a pipe, not a file"),
    "a folder": (replaced("hashes.json", Path.mkdir), "hashes.json: is a folder, not a file"),
    "an engine that is a pipe": (replaced("engine.bin", os.mkfifo), "engine.bin: is a pipe, not a file"),
    "outside": (outside, "names '../elsewhere', which lies outside the checkpoint"),
    "absolute": (absolute, "names '/etc/hostname', which lies outside the checkpoint"),
    "a link that leads out": (linked, "names 'link', which lies outside the checkpoint"),
    "a link to itself": (replaced("engine.bin", lambda path: path.symlink_to(path.name)), "symbolic links"),
    "a name with a zero byte": (lambda folder: listed(folder, "a\0b", "ab"), "which is not a valid file name"),
    "a name of 5000 letters": (lambda folder: listed(folder, "a" * 5000, "ab"), "File name too long"),
    "a file more": (lambda folder: (folder / "more").touch(), "'more' is not listed in hashes.json"),
    "a pipe more": (lambda folder: os.mkfifo(folder / "more"), "'more' is not listed in hashes.json"),
    "a loop of links": (loop, "'more/again' is not listed"),
    "one that is not there": (lambda folder: listed(folder, "more", "ab"), "No such file or directory"),
    "the hash of a folder": (lambda folder: listed(folder, ".", "ab"), "is a folder, not a file"),
    "an engine that never ends": (lambda folder: os.truncate(folder / "engine.bin", 2**40), "bytes that such a file"),
    "weights that never end": (endless_weights, "bytes that belong to no tensor"),
    "no state": (lambda folder: (folder / "state.json").unlink() or reseal(folder), "state.json is not listed"),
    "a state that is no json": (lambda folder: reseal(folder, state_json="{"), "state.json: is not valid JSON"),
    "a state of another step": (lambda folder: reseal(folder, state_json='{"step": 9}'), "is the state of step 9"),
    "a link in its place": (moved, "is not a folder"),
    "a file in its place": (file_in_its_place, "is not a folder"),
} | {
    f"a state with {change}": (partial(reseal, state_json=json.dumps(STATE | change)), "state.json: ")
    for change in (
        {"step": "10"}, {"step": None}, {"step": -1}, {"seconds": "1"}, {"seconds": -1}, {"skipped": 0.5}, {"more": 1},
        {"sums": []}, {"sums": {"loss": 1}}, {"sums": {"loss": [1]}}, {"sums": {"loss": ["1", 2]}}, {"others": {}},
        {"others": [[1]]}, {"window_seconds": None},
    )
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_is_wrong_it_is_passed_over_in_one_line(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=3)
    for step in (5, 10):
        save(checkpoints, step)
    victim, (spoil, reason) = tmp_path / "c" / "step-00000010", DAMAGES[damage]
    spoil(victim)
    with caplog.at_level(logging.WARNING, logger="dvae"):
        found = checkpoints.newest()
    assert found is not None
    assert found[1] == {"step": 5}
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"checkpoint {victim} is damaged (")
    assert reason in line
    assert len(line.splitlines()) == 1
    with pytest.raises(MachineError, match=r"is damaged \(.*\): use another step of \[5, 10\]$"):
        checkpoints.verified_folder(10)
    checkpoints.drop_after(5)
    assert checkpoints.steps() == [5]
    assert (tmp_path / "c" / "other").exists() == (damage == "a link in its place")  # what a link leads to stays


def test_the_whole_state_comes_back_as_it_was(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(10, STATE, put("engine"))
    checkpoints.finish()
    found = checkpoints.newest()
    assert found is not None
    assert found[1] == STATE


def test_what_is_no_checkpoint_by_its_name_is_left_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    for name in ("step-abc", "step-", "step-5", "step-00000010.old", "step-99999999999999999999"):
        (tmp_path / name).mkdir()
    save(checkpoints, 3)
    assert checkpoints.steps() == [3]
    checkpoints.drop_after(0)
    assert len(list(tmp_path.iterdir())) == 5


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
