"""Parts of a build, made by several processes: together they give what one build gives."""

from __future__ import annotations

import fcntl
import multiprocessing
import shutil
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from patterns import Patterns

from dvae.data.building import shard_build as builder
from dvae.data.building import shard_request, staging
from dvae.data.building.shard_build import build, build_part
from dvae.data.shards.manifest import Manifest
from dvae.data.shards.verify import verify
from dvae.errors import MachineError, UserError
from dvae.registry.sources.base import SOURCES

PATTERNS: dict[str, Any] = {"name": "test_patterns"}
SHARD, JOBS = 7, 8  # of 50 images
ASKED: dict[str, Any] = {"heldout_fraction": 0.2, "shard_size": SHARD, "workers": 1}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def written(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file: other ones where a file was written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def make(out: Path, part: int, parts: int, **more: Any) -> int:
    return build_part(PATTERNS, 8, out, part, parts, **{**ASKED, **more})


def publish(out: Path) -> int:
    """The build after parts; returns how many images it found made."""
    calls: list[int] = []
    build(PATTERNS, 8, out, **ASKED, progress=lambda done, total: calls.append(done))
    assert not hidden(out).exists()
    return calls[0]


def hidden(out: Path) -> Path:
    return out.with_name(f".{out.name}.building")


def at(number: int, act: Callable[[], None]) -> Callable[[int, int], None]:
    """Progress that acts once, when `number` images are done."""
    left = [act]

    def progress(done: int, total: int) -> None:
        if done == number and left:
            left.pop()()

    return progress


@given(st.integers(0, 200), st.integers(1, 40))
def test_parts_share_all_jobs_evenly(jobs: int, parts: int):
    blocks = [shard_request.jobs_of_part(range(jobs), part, parts) for part in range(parts)]
    assert [number for block in blocks for number in block] == list(range(jobs))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 11])
def test_parts_in_any_order_give_the_bytes_of_one_build(shards: Path, tmp_path: Path, parts: int):
    out = tmp_path / "out"
    order = sorted(range(parts), key=lambda part: (3 * part + 1) % parts if parts != 3 else -part)
    images = [make(out, part, parts) for part in order]
    assert sum(images) == 50
    assert images.count(0) == max(0, parts - JOBS)
    assert not out.exists()
    before = written(hidden(out) / "shards")
    assert publish(out) == 50
    after = written(out)
    assert {name: after[name] for name in before} == before
    assert content(out) == content(shards)


def test_a_part_again_makes_nothing_and_a_build_makes_what_is_missing(shards: Path, tmp_path: Path):
    out, calls = tmp_path / "out", []
    for _ in range(2):
        assert make(out, 1, 3, progress=lambda done, total: calls.append((done, total))) == 21
    assert calls == [*((i, 21) for i in range(22)), (21, 21)]
    before = written(hidden(out) / "shards")
    assert {name[-10:-4] for name in before} == {"000002", "000003", "000004"}
    assert make(out, 0, 8) == 7  # another number of parts
    assert publish(out) == 28
    after = written(out)
    assert {name: after[name] for name in before} == before
    assert content(out) == content(shards)


@pytest.mark.parametrize("by_part", [False, True])
def test_a_flipped_bit_in_a_finished_job(shards: Path, tmp_path: Path, by_part: bool):
    out = tmp_path / "out"
    make(out, 0, 2), make(out, 1, 2)
    path = hidden(out) / "shards" / "train-000005.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    if by_part:
        calls: list[int] = []
        assert make(out, 1, 2, progress=lambda done, total: calls.append(done)) == 22
        assert calls[0] == 15
    assert publish(out) == (50 if by_part else 43)
    assert content(out) == content(shards)


def test_complete_shards_are_left_alone(shards: Path):
    before = written(shards)
    assert [make(shards, part, 3) for part in range(3)] == [14, 21, 15]
    assert (written(shards), hidden(shards).exists()) == (before, False)
    with pytest.raises(UserError, match=r"image_size 8, not 16"):
        build_part(PATTERNS, 16, shards, 0, 3, **ASKED)


@pytest.mark.parametrize(("part", "parts", "says"), [(-1, 4, "use 0 to 3"), (4, 4, "part=4"), (0, 0, "parts=0")])
def test_no_such_part(tmp_path: Path, part: int, parts: int, says: str):
    with pytest.raises(UserError, match=says):
        make(tmp_path / "out", part, parts)
    assert list(tmp_path.iterdir()) == []


def test_who_may_be_at_work_at_once(shards: Path, tmp_path: Path):
    out, done = tmp_path / "out", []

    def beside_a_part() -> None:
        with pytest.raises(UserError, match="are making parts of"):
            publish(out)
        with pytest.raises(UserError, match="another process is making part=0 parts=2"):
            make(out, 0, 2)
        done.append(make(out, 1, 2))

    def beside_a_build() -> None:
        before = written(hidden(out) / "shards")
        for act in (lambda: make(out, 0, 3), lambda: build(PATTERNS, 8, out, **ASKED)):
            with pytest.raises(UserError, match="another process is building") as error:
                act()
            assert "\n" not in str(error.value)
        assert written(hidden(out) / "shards") == before
        done.append(0)

    make(out, 0, 2, progress=at(10, beside_a_part))
    (hidden(out) / "job-000006.json").unlink()
    build(PATTERNS, 8, out, **ASKED, progress=at(45, beside_a_build))
    assert done == [22, 0]
    assert content(out) == content(shards)


def test_parts_of_another_request_are_refused(shards: Path, tmp_path: Path):
    out = tmp_path / "out"
    make(out, 0, 2)
    before = {path.name: written(path) for path in (hidden(out), hidden(out) / "shards")}
    for node, size, difference in ((PATTERNS, 16, "image_size 8, not 16"),
                                   ({**PATTERNS, "count": 51}, 8, "source.count 50, not 51")):  # fmt: skip
        with pytest.raises(UserError, match=difference):
            build_part(node, size, out, 1, 2, **ASKED)
    left = {path.name: written(path) for path in (hidden(out), hidden(out) / "shards")}
    left[hidden(out).name].pop("lock-1-of-2")
    assert left == before
    (hidden(out) / "request.json").write_text("{")
    with pytest.raises(UserError, match=r"request\.json: is not valid JSON .*: remove "):
        make(out, 1, 2)
    assert publish(out) == 28
    assert content(out) == content(shards)


def test_a_build_removes_parts_of_another_request(tmp_path: Path, shards: Path):
    out = tmp_path / "out"
    build_part({**PATTERNS, "count": 60}, 8, out, 0, 2, **ASKED)
    assert publish(out) == 0
    assert content(out) == content(shards)


def test_each_part_counts_its_damage_and_the_build_all(tmp_path: Path):
    """Of 9 damaged images, 7 are in the first part and 2 in the second."""
    out, node = tmp_path / "out", {**PATTERNS, "damaged": 9}
    with pytest.raises(UserError, match=r"more than 0\.1 of 50 images are damaged"):
        build_part(node, 8, out, 0, 8, **ASKED, max_bad_fraction=0.1)
    assert build_part(node, 8, out, 1, 8, **ASKED, max_bad_fraction=0.1) == 7
    assert build_part(node, 8, out, 0, 8, **ASKED, max_bad_fraction=0.15) == 7
    before = content(hidden(out) / "shards")
    with pytest.raises(UserError, match=r"more than 0\.1 of 50 images are damaged"):
        build_part(node, 8, out, 0, 8, **ASKED, max_bad_fraction=0.1)  # those it made before
    assert content(hidden(out) / "shards") == before
    assert build_part(node, 8, out, 1, 2, **ASKED, max_bad_fraction=0.1) == 22
    build(node, 8, tmp_path / "whole", **ASKED, max_bad_fraction=0.2)
    shutil.copytree(hidden(out), tmp_path / ".more.building")
    with pytest.raises(UserError, match=r"more than 0\.15 of 50 images are damaged"):
        build(node, 8, out, **ASKED, max_bad_fraction=0.15)
    assert not hidden(out).exists()
    with pytest.raises(UserError, match=r"more than 0\.15 of 50 images are damaged"):
        build_part(node, 8, out, 0, 1, **ASKED, max_bad_fraction=0.15)  # over jobs that it makes in a row
    assert build(node, 8, tmp_path / "more", **ASKED, max_bad_fraction=0.2).damaged == 9
    assert content(tmp_path / "more") == content(tmp_path / "whole")


def test_shards_that_appear_while_a_part_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: Path):
    out, source = tmp_path / "out", builder._open_source

    def meanwhile(wanted: dict[str, Any]) -> Any:
        monkeypatch.setattr(builder, "_open_source", source)
        publish(out)
        return source(wanted)

    monkeypatch.setattr(builder, "_open_source", meanwhile)
    assert make(out, 0, 2) == 28
    assert content(out) == content(shards)
    assert not hidden(out).exists()


def test_a_folder_that_goes_while_its_lock_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: Path):
    out, take = tmp_path / "out", staging._try_lock

    def meanwhile(handle: Any, shared: bool) -> bool:
        monkeypatch.setattr(staging, "_try_lock", take)
        shutil.rmtree(hidden(out))
        return take(handle, shared)

    def still_locked() -> None:
        with pytest.raises(UserError, match="are making parts"):
            publish(out)

    monkeypatch.setattr(staging, "_try_lock", meanwhile)
    assert make(out, 0, 1, progress=at(3, still_locked)) == 50
    assert publish(out) == 50
    assert content(out) == content(shards)


@pytest.mark.parametrize("other", ["part", "build"])
def test_without_locks_work_is_lost_but_no_shard_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: Path, other: str
):
    """A file system that grants every lock: the same part, or a build, at work in the midst of a part."""
    out = tmp_path / "out"
    monkeypatch.setattr(fcntl, "flock", lambda handle, how: None)

    def meanwhile() -> None:
        assert (make(out, 0, 1) if other == "part" else publish(out)) == (50 if other == "part" else 28)

    with pytest.raises(MachineError, match=r"No such file.*the same command again"):
        make(out, 0, 1, progress=at(30, meanwhile))
    assert make(out, 0, 1) == 50
    if other == "part":
        publish(out)
    assert content(out) == content(shards)
    verify(out)


STOP = 10  # images: in the midst of a part's second job


def waiting_part(out: Path, part: int, parts: int, pipe: Connection) -> None:
    """Make a part; in its midst tell so, and wait to be told to go on."""
    SOURCES._classes["test_patterns"] = Patterns

    def wait() -> None:
        pipe.send(STOP)
        pipe.recv()

    make(out, part, parts, progress=at(STOP, wait))


def started(out: Path, part: int, parts: int) -> tuple[ForkServerProcess, Connection]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dvae.data.building.shard_build"])
    here, there = context.Pipe()
    process = context.Process(target=waiting_part, args=(out, part, parts, there))
    process.start()
    there.close()
    return process, here


@pytest.mark.slow
def test_processes_at_once_and_one_killed(shards: Path, tmp_path: Path):
    out = tmp_path / "out"
    parts = [started(out, part, 3) for part in range(3)]
    try:
        assert [pipe.poll(60) and pipe.recv() for _, pipe in parts] == [STOP] * 3
        assert {path.name.partition(".")[0] for path in hidden(out).glob("work-*")} == {
            f"work-{part}-of-3" for part in range(3)
        }
        parts[1][0].kill()  # SIGKILL
        parts[1][0].join(60)
        for process, pipe in (parts[0], parts[2]):
            pipe.send("go on")
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process, pipe in parts:
            process.kill()
            process.join()
            pipe.close()
    assert len(list(hidden(out).glob("work-*"))) == 1
    calls: list[int] = []
    assert make(out, 1, 3, progress=lambda done, total: calls.append(done)) == 21
    assert calls[0] == 7
    assert not list(hidden(out).glob("work-*"))
    assert publish(out) == 50
    assert content(out) == content(shards)
    assert Manifest.load(out) == Manifest.load(shards)
