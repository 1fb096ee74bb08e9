"""A build that is interrupted: finished shards are kept, and the result is what an undisturbed build makes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset
from patterns import pixels_of
from PIL import Image

from dvae.data.building.shard_build import build
from dvae.data.building.staging import StagingFolder
from dvae.errors import MachineError, UserError

PATTERNS = {"name": "test_patterns"}
SHARD = 7


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def written(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file: other ones where a file was written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def interrupt_at(number: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == number:
            raise KeyboardInterrupt

    return progress


def begin(out: Path, number: int, node: dict | None = None) -> Path:
    """A build that is interrupted after `number` images, and the folder in which it lies."""
    with pytest.raises(KeyboardInterrupt):
        build(node or PATTERNS, 8, out, 0.2, shard_size=SHARD, workers=1, progress=interrupt_at(number))
    return out.with_name(f".{out.name}.building")


def finish(out: Path, node: dict | None = None) -> int:
    """The same request again; returns how many images it began with."""
    calls: list[int] = []
    build(node or PATTERNS, 8, out, 0.2, shard_size=SHARD, workers=1, progress=lambda done, total: calls.append(done))
    assert not out.with_name(f".{out.name}.building").exists()
    return calls[0] if calls else -1


@pytest.mark.parametrize(("number", "kept"), [(0, 0), (6, 0), (8, 7), (31, 28), (49, 42), (50, 49)])
def test_finished_shards_are_kept_and_the_result_is_the_same(shards: Path, tmp_path: Path, number: int, kept: int):
    aside = begin(tmp_path / "out", number)
    assert not (tmp_path / "out").exists()
    before = written(aside / "shards")
    assert finish(tmp_path / "out") == kept
    after = written(tmp_path / "out")
    finished = {f"{split}-{n:06d}{suffix}" for split in ("train", "heldout") for n in range(kept // SHARD)
                for suffix in (".tar", ".npy")} & set(after)  # fmt: skip
    assert len(finished) >= 2 * (kept // SHARD)
    assert {name: after[name] for name in finished} == {name: before[name] for name in finished}
    assert content(tmp_path / "out") == content(shards)


def test_interrupted_again_and_again(shards: Path, tmp_path: Path):
    for number in (10, 12, 20, 20, 48):
        begin(tmp_path / "out", number)
    assert finish(tmp_path / "out") == 42
    assert content(tmp_path / "out") == content(shards)


def test_killed_before_the_folder_appears(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    def publish(self: StagingFolder, file: str, content: dict[str, Any]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "chmod", killed)  # the manifest is half-written
            original(self, file, content)

    original = StagingFolder.publish
    with monkeypatch.context() as patch:
        patch.setattr(StagingFolder, "publish", publish)
        with pytest.raises(KeyboardInterrupt):
            build(PATTERNS, 8, tmp_path / "out", 0.2, shard_size=SHARD, workers=1)
    before = written(tmp_path / ".out.building" / "shards")
    assert finish(tmp_path / "out") == 50  # nothing is rendered again
    after = written(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert content(tmp_path / "out") == content(shards)


def test_labels_and_damage_of_finished_shards_are_remembered(tmp_path: Path):
    node = {**PATTERNS, "damaged": 3}

    def whole(out: Path, **more: object) -> None:
        build(node, 8, out, 0.2, shard_size=SHARD, workers=1, max_bad_fraction=0.1, **more)

    whole(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        whole(tmp_path / "out", progress=interrupt_at(30))
    whole(tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_too_many_damaged_images_of_finished_shards(tmp_path: Path):
    node = {**PATTERNS, "damaged": 3}
    with pytest.raises(KeyboardInterrupt):
        build(node, 8, tmp_path / "out", 0.2, 3, SHARD, 1, interrupt_at(30), max_bad_fraction=0.1)
    with pytest.raises(UserError, match=r"more than 0\.02 of 50"):
        build(node, 8, tmp_path / "out", 0.2, 3, SHARD, 1, max_bad_fraction=0.02)
    assert list(tmp_path.iterdir()) == []


def test_another_request_starts_over(shards: Path, tmp_path: Path):
    begin(tmp_path / "out", 30, {**PATTERNS, "count": 40})
    assert finish(tmp_path / "out") == 0
    assert content(tmp_path / "out") == content(shards)


def test_a_damaged_finished_shard_is_made_again(shards: Path, tmp_path: Path):
    aside = begin(tmp_path / "out", 30)
    path = aside / "shards" / "train-000002.tar"
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[700] ^= 255
    path.write_bytes(data)
    assert finish(tmp_path / "out") == 21  # jobs 0, 1 and 3
    assert content(tmp_path / "out") == content(shards)


@pytest.mark.parametrize("text", ["", "[]", '{"request": 1}', '{"request": "SAME", "job": {"shards": {}, "more": 1}}'])
def test_a_journal_that_makes_no_sense(shards: Path, tmp_path: Path, text: str):
    aside = begin(tmp_path / "out", 30)
    journal = aside / "job-000001.json"
    journal.write_text(text.replace("SAME", json.loads(journal.read_text())["request"]))
    assert finish(tmp_path / "out") == 21
    assert content(tmp_path / "out") == content(shards)


@pytest.fixture
def pictures(tmp_path: Path) -> dict:
    """A source of 30 files, b00.png to b29.png."""
    (tmp_path / "in").mkdir()
    for i in range(30):
        picture(tmp_path / "in" / f"b{i:02}.png", i)
    return {"name": "folder", "path": str(tmp_path / "in")}


def picture(path: Path, number: int) -> None:
    Image.fromarray(pixels_of(number).transpose(1, 2, 0)).save(path)


@pytest.mark.parametrize(("change", "kept"), [("z.png", 14), ("b15.png", 14), ("b00a.png", 0), ("-b03.png", 0)])
def test_a_source_that_changed_meanwhile(tmp_path: Path, pictures: dict, change: str, kept: int):
    """Shards after an image that came or went are made again."""
    begin(tmp_path / "out", 20, pictures)
    path = tmp_path / "in" / change.removeprefix("-")
    if change.startswith("-"):
        path.unlink()
    else:
        picture(path, 99)
    assert finish(tmp_path / "out", pictures) == kept
    build(pictures, 8, tmp_path / "whole", 0.2, shard_size=SHARD, workers=1)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_an_image_came_and_another_went(tmp_path: Path, pictures: dict):
    """Unit 2 ends with the image with which it ended, but begins with another."""
    begin(tmp_path / "out", 29, pictures)
    picture(tmp_path / "in" / "b00a.png", 99)
    (tmp_path / "in" / "b16.png").unlink()
    assert finish(tmp_path / "out", pictures) == 7  # job 3
    build(pictures, 8, tmp_path / "whole", 0.2, shard_size=SHARD, workers=1)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_full_disk(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write = webdataset.TarWriter.write

    def full(self: webdataset.TarWriter, sample: dict) -> int:
        if sample["__key__"] == "000000030":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, sample)

    with monkeypatch.context() as patch:
        patch.setattr(webdataset.TarWriter, "write", full)
        with pytest.raises(MachineError, match=r"No space left.*finished shards are kept"):
            build(PATTERNS, 8, tmp_path / "out", 0.2, shard_size=SHARD, workers=1)
    assert finish(tmp_path / "out") == 28
    assert content(tmp_path / "out") == content(shards)


SLOW_BUILD = """
import sys, time
from dvae.data.building.shard_build import build
def told(done, total):
    print(done, flush=True)
    time.sleep(0.01)
if __name__ == "__main__":
    build({"name": "folder", "path": sys.argv[1]}, 8, sys.argv[2], 0.2, shard_size=40, workers=2, progress=told)
"""


@pytest.mark.slow
def test_kill_9_with_processes_at_work(tmp_path: Path):
    (tmp_path / "in").mkdir()
    for i in range(280):
        picture(tmp_path / "in" / f"{i:03}.png", i)
    script, out, node = tmp_path / "script.py", tmp_path / "out", {"name": "folder", "path": str(tmp_path / "in")}
    script.write_text(SLOW_BUILD)
    process = subprocess.Popen([sys.executable, script, tmp_path / "in", out], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        while process.stdout.readline() != b"100\n":
            assert process.poll() is None
        with pytest.raises(UserError, match="another process is building"):
            build(node, 8, out, 0.2, shard_size=40, workers=1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert not out.exists()
    _wait_for_workers_to_end(script)
    calls: list[int] = []
    build(node, 8, out, 0.2, shard_size=40, workers=1, progress=lambda done, total: calls.append(done))
    assert calls[0] == 80
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "script.py"]
    build(node, 8, tmp_path / "whole", 0.2, shard_size=40, workers=1)
    assert content(out) == content(tmp_path / "whole")


def _wait_for_workers_to_end(script: Path) -> None:
    """Worker processes follow their killed parent."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        commands = [_command(pid) for pid in os.listdir("/proc") if pid.isdigit()]
        if not any(str(script).encode() in command for command in commands):
            return
        time.sleep(0.1)
    raise AssertionError("a worker outlived its parent by 10 seconds")


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
