"""Writing a cache in jobs: parts together, or a write that was killed, give what one write gives."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from webdataset import TarWriter

from dvae.data.building import cache_build
from dvae.data.building.cache_build import CacheSpec, build_cache, build_cache_part
from dvae.data.latent_cache import CachedSample, CacheInfo, LatentCache
from dvae.data.shards.reader import Shards
from dvae.errors import MachineError, UserError

SHARD, BATCH = 7, 4


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_build, "SHARD_SIZE", SHARD)


def work(shards: Path, batch: int = BATCH, act: Callable[[int], None] = lambda index: None, **about: Any) -> CacheSpec:
    """A cache of the mean and the first pixel of each image; `act` is called with each index before it is made."""
    images = Shards(shards, cache_bytes=0, max_bad_fraction=0.05)

    def samples(start: int, stop: int) -> Iterator[CachedSample]:
        for index in range(start, stop):
            act(index)
            pixels = images.read([index])[0].numpy()
            numbers = np.array([[pixels.mean(), index], [pixels[0, 0, 0], 0]], np.float32)
            yield CachedSample(numbers[: made.draws or 2], [pixels.transpose(1, 2, 0)] * made.draws)

    made = CacheInfo(**{"images": len(images), "draws": 1, "latent": [2], "encoder_sha256": "e", "images_sha256": "i",
                    "precision": "fp32", "seed": 0, **about})  # fmt: skip
    return CacheSpec(made, batch, images, samples)


def publish(folder: Path, wanted: CacheSpec) -> int:
    """Write the cache; returns how many images were found made."""
    calls: list[int] = []
    build_cache(folder, wanted, lambda done, total: calls.append(done))
    assert not hidden(folder).exists()
    return calls[0] if calls else -1


def part(folder: Path, wanted: CacheSpec, number: int, parts: int) -> int:
    """Make a part; returns how many of its images were found made."""
    calls: list[int] = []
    images = build_cache_part(folder, wanted, number, parts, lambda done, total: calls.append(done))
    assert not calls or calls[-1] == images
    return calls[0] if calls else -1


def hidden(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.building")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture
def whole(shards: Path, tmp_path: Path) -> dict[str, bytes]:
    """What one write gives."""
    assert publish(tmp_path / "whole", work(shards)) == 0
    return content(tmp_path / "whole")


def test_a_part_again_makes_nothing_and_a_write_makes_what_is_missing(
    shards: Path, whole: dict[str, bytes], tmp_path: Path
):
    folder, made = tmp_path / "out", []
    wanted = work(shards, act=made.append)
    assert [part(folder, wanted, 1, 3), part(folder, wanted, 1, 3)] == [0, 14]
    assert made == list(range(14, 28))
    with pytest.raises(UserError, match="no finished cache"):
        LatentCache(folder, wanted.info)
    assert publish(folder, wanted) == 14
    assert sorted(made) == list(range(wanted.info.images))
    assert content(folder) == whole
    assert [part(folder, wanted, number, 3) for number in range(3)] == [-1] * 3
    assert part(folder, work(shards, batch=9), 0, 3) == -1  # what is complete may be of another batch
    assert (publish(folder, wanted), content(folder)) == (-1, whole)


def test_an_interrupted_write_goes_on_after_its_finished_shards(shards: Path, whole: dict[str, bytes], tmp_path: Path):
    def interrupt(index: int) -> None:
        if index == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "out", work(shards, act=interrupt))
    assert not (tmp_path / "out").exists()
    assert publish(tmp_path / "out", work(shards)) == 14
    assert content(tmp_path / "out") == whole


def test_a_part_that_was_killed(shards: Path, whole: dict[str, bytes], tmp_path: Path):
    folder = tmp_path / "out"

    def kill(index: int) -> None:
        if index == 16:
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=part, args=(folder, work(shards, act=kill), 0, 2))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert list(hidden(folder).glob("work-0-of-2.*"))
    assert part(folder, work(shards), 0, 2) == 14
    assert not list(hidden(folder).glob("work-*"))
    assert publish(folder, work(shards)) == 21
    assert content(folder) == whole


@pytest.mark.parametrize("name", ["latents-000001.tar", "latents-000001.npy"])
def test_a_flipped_bit_in_a_finished_job(shards: Path, whole: dict[str, bytes], tmp_path: Path, name: str):
    folder = tmp_path / "out"
    part(folder, work(shards), 0, 2)
    flip(hidden(folder) / "shards" / name, 150)
    assert publish(folder, work(shards)) == 14
    assert content(folder) == whole


@pytest.mark.parametrize("text", ["", "[]", '{"request": "SAME", "job": {"shard": {}, "damaged": {}}}'])
def test_a_journal_that_makes_no_sense(shards: Path, whole: dict[str, bytes], tmp_path: Path, text: str):
    folder = tmp_path / "out"
    part(folder, work(shards), 0, 2)
    journal = hidden(folder) / "job-000001.json"
    journal.write_text(text.replace("SAME", journal.read_text().split('"')[3]))
    assert publish(folder, work(shards)) == 14
    assert content(folder) == whole


@pytest.mark.parametrize(
    ("other", "says"),
    [({"encoder_sha256": "other"}, "encoder_sha256 other, not e"), ({"seed": 1}, "seed 1, not 0"),
     ({"images_sha256": "more"}, "images_sha256 more"), ({"draws": 2}, "draws 2"), ({"batch": 8}, "batch 8, not 4")],
)  # fmt: skip
def test_another_request_refuses_a_part_and_gives_way_to_a_write(
    shards: Path, whole: dict[str, bytes], tmp_path: Path, other: dict[str, Any], says: str
):
    folder, theirs = tmp_path / "out", work(shards, **other)
    part(folder, theirs, 0, 2)
    with pytest.raises(UserError, match=f"parts of another request.*{says}"):
        part(folder, work(shards), 1, 2)
    assert publish(folder, work(shards)) == 0
    assert content(folder) == whole


def test_who_may_be_at_work_at_once(shards: Path, whole: dict[str, bytes], tmp_path: Path):
    folder, seen = tmp_path / "out", []

    def beside_a_part(index: int) -> None:
        if index == 3:
            with pytest.raises(UserError, match="are making parts of"):
                publish(folder, work(shards))
            seen.append(part(folder, work(shards), 1, 2))

    def beside_a_write(index: int) -> None:
        with pytest.raises(UserError, match="another process is building"):
            part(folder, work(shards), 1, 2)
        seen.append(index)

    part(folder, work(shards, act=beside_a_part), 0, 2)
    (hidden(folder) / "job-000002.json").unlink()
    publish(folder, work(shards, act=beside_a_write))
    assert seen == [0, *range(14, 21)]
    assert content(folder) == whole


def test_what_is_no_cache_or_that_of_another_is_left_alone(shards: Path, whole: dict[str, bytes], tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    for act in (lambda: publish(tmp_path / "out", work(shards)), lambda: part(tmp_path / "out", work(shards), 0, 2)):
        with pytest.raises(UserError, match="holds no cache"):
            act()
    (tmp_path / "out" / "thesis.tex").unlink()
    assert publish(tmp_path / "out", work(shards)) == 0  # an empty folder will do
    for act in (lambda: publish(tmp_path / "out", work(shards, seed=1)),
                lambda: part(tmp_path / "out", work(shards, seed=1), 0, 2)):  # fmt: skip
        with pytest.raises(UserError, match="was made with seed 0, this run has 1"):
            act()
    assert content(tmp_path / "out") == whole


def test_damaged_images_that_parts_met_are_known_in_the_end(shards: Path, tmp_path: Path):
    sound = Shards(shards)
    file, offset, _ = sound.members.where(16, 0)
    flip(shards / file, offset + 60)
    folder, last = tmp_path / "out", work(shards)
    for number in range(3):
        part(folder, work(shards), number, 3)
    assert publish(folder, last) == len(sound)
    assert list(last.images.damaged) == [16]
    _, pictures = LatentCache(folder, last.info).reconstructions(torch.tensor([16, 17]), torch.tensor([0, 0]))
    assert torch.equal(pictures[0], pictures[1])  # the next good one, as everywhere


def test_a_full_disk(shards: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original = TarWriter.write

    def full(self: TarWriter, sample: dict[str, Any]) -> int:
        if sample["__key__"] == "000000016":
            raise OSError(28, os.strerror(28))
        return original(self, sample)

    with monkeypatch.context() as patch:
        patch.setattr(TarWriter, "write", full)
        with pytest.raises(MachineError, match=r"writing the cache to .*No space left.*finished shards are kept"):
            publish(tmp_path / "out", work(shards))
    assert publish(tmp_path / "out", work(shards)) == 14
    assert content(tmp_path / "out") == whole
