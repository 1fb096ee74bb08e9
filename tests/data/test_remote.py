"""Shards elsewhere: every file is fetched once, whole and checked; what fails is asked for again, and then named."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_server import Server, serving

from dvae.data.loading.loader import Loader
from dvae.data.loading.order import Order
from dvae.data.loading.prefetch import Prefetcher
from dvae.data.shards import remote as remotes
from dvae.data.shards.manifest import Manifest
from dvae.data.shards.reader import Shards
from dvae.data.shards.remote import RemoteShards, file_url, is_remote, read_manifest
from dvae.errors import MachineError, UserError


@pytest.fixture(autouse=True)
def _direct_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remotes, "RETRY_PAUSE", 0.01)


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    with serving(shards) as running:
        yield running


def gib(size: float) -> float:
    return size / 2**30


def everything(data: Shards) -> torch.Tensor:
    return data.read(range(len(data)))


def tars(remote: RemoteShards) -> list[Path]:
    return sorted(remote.folder.glob("*.tar"))


def stored(remote: RemoteShards) -> int:
    """Bytes of the shards that are there; the listing and the sizes are of one moment, held by the folder's lock."""
    with remote._space_lock():
        return sum(path.stat().st_size for path in tars(remote))


def aws(folder: Path, bin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put a program `aws` on the path that copies from a folder as the real one does from a bucket."""
    bin_folder.mkdir()
    script = bin_folder / "aws"
    script.write_text(f'#!/bin/sh\n[ "$1 $2 $4" = "s3 cp -" ] && exec cat {folder}/"${{3##*/}}"\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    return "s3://bucket/faces"


PLACES: dict[str, Callable[[Server, Path, Path, pytest.MonkeyPatch], str]] = {
    "http": lambda server, shards, tmp, patch: server.url,
    "pipe": lambda server, shards, tmp, patch: f"pipe:cat {shards}",
    "pipe with %s": lambda server, shards, tmp, patch: f"pipe:cat {shlex.quote(str(shards))}/%s | cat",
    "file": lambda server, shards, tmp, patch: f"file://{shards}",
    "s3": lambda server, shards, tmp, patch: aws(shards, tmp / "bin", patch),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_same_images_from_everywhere(
    place: str, split: str, server: Server, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    location = PLACES[place](server, shards, tmp_path, monkeypatch)
    assert is_remote(location)
    assert not is_remote(str(shards))
    here, there = Shards(shards, split), Shards(RemoteShards(location, tmp_path / "to", 1.0), split, cache_bytes=0)
    assert torch.equal(everything(there), everything(here))
    assert there.info(3) == here.info(3)
    assert torch.equal(there.classes("parity", ["odd", "even"]), here.classes("parity", ["odd", "even"]))
    assert Manifest.parse(read_manifest(location), location) == here.manifest


def test_a_file_is_fetched_once(server: Server, tmp_path: Path):
    for _ in range(2):  # the second time as a run that is resumed
        everything(Shards(RemoteShards(server.url, tmp_path / "to", 1.0), cache_bytes=0))
    assert set(server.asked.values()) == {1}
    names = {path.name for path in (RemoteShards(server.url, tmp_path / "to", 1.0)).folder.iterdir()}
    assert names == server.asked.keys() | {".room"}


def read_all(url: str, to: Path, sums: multiprocessing.Queue[int]) -> None:
    data = Shards(RemoteShards(url, to, 1.0), cache_bytes=0)
    threads = [threading.Thread(target=everything, args=[data]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sums.put(int(everything(data).int().sum()))


def test_processes_and_threads_fetch_a_file_once(server: Server, shards: Path, tmp_path: Path):
    server.delay = 0.02
    spawn = multiprocessing.get_context("fork")
    sums = spawn.Queue()
    workers = [spawn.Process(target=read_all, args=[server.url, tmp_path / "to", sums]) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [sums.get(timeout=20) for _ in workers]
    for worker in workers:
        worker.join()
    assert found == 2 * [int(everything(Shards(shards)).int().sum())]
    assert set(server.asked.values()) == {1}


@pytest.mark.parametrize("fault", ["cut", "missing"])
def test_what_fails_is_asked_for_again(fault: str, server: Server, shards: Path, tmp_path: Path):
    data = Shards(RemoteShards(server.url, tmp_path / "to", 1.0), cache_bytes=0)
    setattr(server, fault, remotes.ATTEMPTS - 1)
    assert torch.equal(everything(data), everything(Shards(shards)))
    assert server.asked["train-000000.tar"] == remotes.ATTEMPTS


def test_a_shard_that_vanishes_for_good_is_named(server: Server, shards: Path, tmp_path: Path):
    data = Shards(RemoteShards(server.url, tmp_path / "to", 1.0), cache_bytes=0)
    (shards / "train-000001.tar").unlink()
    with pytest.raises(MachineError) as error:
        everything(data)
    said = str(error.value)
    assert said.startswith(f"train-000001.tar cannot be fetched from data.shards={server.url} (")
    assert "5 attempts" in said
    assert "\n" not in said
    assert server.asked["train-000001.tar"] == remotes.ATTEMPTS
    assert not list(tmp_path.rglob("*.part"))


def test_a_server_that_falls_silent_is_given_up(
    server: Server, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(remotes, "STALL_TIMEOUT", 0.1)
    data = Shards(RemoteShards(server.url, tmp_path / "to", 1.0), cache_bytes=0)
    server.silent = True
    began = time.monotonic()
    with pytest.raises(MachineError, match=r"no data arrived for 0\.1 seconds"):
        data.read([0])
    assert time.monotonic() - began < 5


def test_a_flipped_bit_on_the_way_is_never_accepted(server: Server, shards: Path, tmp_path: Path):
    data = Shards(RemoteShards(server.url, tmp_path / "to", 1.0), cache_bytes=0)
    flipped = bytearray((shards / "train-000000.tar").read_bytes())
    flipped[1500] ^= 1
    (shards / "train-000000.tar").write_bytes(flipped)
    with pytest.raises(
        MachineError, match=r"train-000000\.tar cannot be fetched .* do not match the manifest.s sha256"
    ):
        data.read([0])
    assert not tars(RemoteShards(server.url, tmp_path / "to", 1.0))


def test_a_shard_or_index_that_was_cut_here_is_fetched_again(server: Server, shards: Path, tmp_path: Path):
    remote = RemoteShards(server.url, tmp_path / "to", 1.0)
    expected = everything(Shards(remote, cache_bytes=0))
    os.truncate(remote.folder / "train-000001.tar", 100)
    (remote.folder / "train-000002.npy").write_bytes(b"nonsense")
    (remote.folder / ".train-000003.tar.part").write_bytes(b"x" * 1000)  # of a killed process
    (remote.folder / "train-000003.tar").unlink()
    assert torch.equal(everything(Shards(remote, cache_bytes=0)), expected)
    assert [name for name, count in sorted(server.asked.items()) if count > 1] == [
        "train-000001.tar", "train-000002.npy", "train-000003.tar",
    ]  # fmt: skip


def test_no_manifest_there(server: Server, shards: Path, tmp_path: Path):
    for location in (f"{server.url}/nowhere", f"pipe:cat {tmp_path}/nothing/%s 2>/dev/null"):
        with pytest.raises(UserError, match=f"no shards at data.shards={re.escape(location)}"):
            read_manifest(location)
    with pytest.raises(UserError, match=r"ftq://x.*use pipe:, http://"):
        read_manifest("ftq://x")


def test_a_manifest_that_names_foreign_files_is_refused(shards: Path, tmp_path: Path):
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["splits"]["train"][0]["file"] = "../../x; touch y"
    (shards / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"names a file '\.\./\.\./x; touch y'"):
        Shards(RemoteShards(f"pipe:cat {shards}/%s", tmp_path / "to", 1.0))


def test_addresses():
    assert file_url("http://h/a/", "x.tar") == "http://h/a/x.tar"
    assert file_url("https://h/a/%s?key=1", "x.tar") == "https://h/a/x.tar?key=1"
    assert file_url("pipe:ssh h cat /a", "x.tar") == "pipe:ssh h cat /a/x.tar"
    assert file_url("s3://b/a b", "x.tar") == "pipe:aws s3 cp 's3://b/a b/x.tar' -"


def test_the_limit_is_kept_and_old_shards_go_first(server: Server, shards: Path, tmp_path: Path):
    sizes = [shard.bytes for shard in Manifest.load(shards).splits["train"]]
    limit = 3 * max(sizes)
    remote = RemoteShards(server.url, tmp_path / "to", gib(limit))
    data = Shards(remote, cache_bytes=0)
    expected = everything(Shards(shards))
    for index in range(len(data)):
        assert torch.equal(data.read([index])[0], expected[index])
        assert stored(remote) <= limit
    kept = [path.name for path in tars(remote)]
    assert kept == [shard.file for shard in data.shards][-len(kept) :]
    assert len(kept) >= 3


def test_a_limit_below_the_largest_shard_is_refused(server: Server, tmp_path: Path):
    with pytest.raises(UserError, match=r"data\.download_gib=9\.3.*: the largest shard at http.* use that or more"):
        Shards(RemoteShards(server.url, tmp_path / "to", 1e-8))


def loader(data: Shards, rank: int = 0, world: int = 1, **options: int) -> Loader:
    return Loader(data, Order(len(data), 3, block=4, window=2), 8, rank=rank, world=world, seed=5, **options)


def test_a_limit_below_a_window_is_refused(server: Server, shards: Path, tmp_path: Path):
    largest = max(shard.bytes for shard in Manifest.load(shards).splits["train"])
    data = Shards(RemoteShards(server.url, tmp_path / "to", gib(largest)), cache_bytes=0)
    with pytest.raises(UserError, match=r"a window of 2 blocks may read 4 of 8 shards, .* use data\.download_gib="):
        loader(data)


@pytest.mark.parametrize("threads", [0, 2])
def test_training_reads_on_while_shards_come_and_go(threads: int, server: Server, shards: Path, tmp_path: Path):
    sizes = sorted(shard.bytes for shard in Manifest.load(shards).splits["train"])
    remote = RemoteShards(server.url, tmp_path / "to", gib(sum(sizes[-5:])))
    here = loader(Shards(shards))
    with loader(Shards(remote, cache_bytes=0), threads=threads) as there:
        for sample in [*range(0, 160, 8), 800, 8]:
            for a, b in zip(here.step(sample), there.step(sample), strict=True):
                assert torch.equal(a.images, b.images)
            assert stored(remote) <= remote.limit


def test_a_shard_is_published_while_nobody_counts(server: Server, shards: Path, tmp_path: Path):
    """Renamed between the listing and the sizes it would count for nothing, and another would come too many."""
    remote = RemoteShards(server.url, tmp_path / "to", 1.0)
    (shard, *_) = remote.manifest().splits["train"]
    fetch = threading.Thread(target=lambda: os.close(remote.open(shard)))
    with remote._space_lock():
        fetch.start()
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            assert not (remote.folder / shard.file).exists()
            time.sleep(0.01)
    fetch.join(20)
    assert (remote.folder / shard.file).exists()


def test_what_will_be_read_is_fetched_ahead_in_that_order(server: Server, shards: Path, tmp_path: Path):
    data = Shards(RemoteShards(server.url, tmp_path / "to", 1.0), cache_bytes=0)
    order = Order(len(data), 3, block=4, window=2)
    assert data.remote is not None
    ahead = Prefetcher(data.remote, data.shards, order)
    indices = order.indices(5, 5 + len(data))
    files = [data.members.place(int(index))[0] for index in indices]
    assert [shard.file for shard in ahead.wanted(5)] == list(dict.fromkeys(files))
    ahead.at(5)
    deadline = time.monotonic() + 20
    while len(tars(data.remote)) < len(data.shards):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ahead.close()
    assert [name for name in server.asked if name.startswith("train") and name.endswith(".tar")] == list(
        dict.fromkeys(files)
    )
    before = server.asked.total()
    everything(data)
    assert server.asked.total() == before


def test_only_what_fits_is_fetched_ahead(server: Server, shards: Path, tmp_path: Path):
    sizes = sorted(shard.bytes for shard in Manifest.load(shards).splits["train"])
    data = Shards(RemoteShards(server.url, tmp_path / "to", gib(sum(sizes[-5:]))), cache_bytes=0)
    assert data.remote is not None
    ahead = Prefetcher(data.remote, data.shards, Order(len(data), 3, block=4, window=2))
    for sample in range(0, 200, 7):
        assert sum(shard.bytes for shard in ahead.wanted(sample)) <= data.remote.limit
        assert len(ahead.wanted(sample)) >= 4


def test_two_ranks_fetch_each_shard_once(server: Server, shards: Path, tmp_path: Path):
    server.delay = 0.01
    expected = loader(Shards(shards))
    ranks = [loader(Shards(RemoteShards(server.url, tmp_path / "to", 1.0), cache_bytes=0), r, 2) for r in range(2)]
    for sample in range(0, 80, 8):
        (whole,) = expected.step(sample)
        parts = [rank.step(sample)[0].images for rank in ranks]
        assert torch.equal(torch.cat(parts), whole.images)
    for rank in ranks:
        rank.close()
    assert set(server.asked.values()) == {1}


def test_closing_ends_a_fetch_that_hangs(server: Server, shards: Path, tmp_path: Path):
    data = Shards(RemoteShards(server.url, tmp_path / "to", 1.0), cache_bytes=0)
    assert data.remote is not None
    ahead = Prefetcher(data.remote, data.shards, Order(len(data), 3, block=4, window=2))
    server.silent = True
    ahead.at(0)
    while not any(name.endswith(".tar") for name in server.asked):
        time.sleep(0.01)
    began = time.monotonic()
    ahead.close()
    assert time.monotonic() - began < 5
    assert not list(tmp_path.rglob("*.part"))


def test_a_folder_that_cannot_be_written(server: Server, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.download_to: .* cannot be written"):
        Shards(RemoteShards(server.url, tmp_path / "file", 1.0))


def test_an_index_that_lies_elsewhere_is_the_same(server: Server, shards: Path, tmp_path: Path):
    data = Shards(RemoteShards(server.url, tmp_path / "to", 1.0))
    for shard in data.shards:
        assert np.array_equal(np.load(data.folder / shard.index), np.load(shards / shard.index))
