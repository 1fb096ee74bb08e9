"""What a server sends is bounded and checked: an answer without end ends, and names cannot become commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from hostile_shards import change
from hostile_shards import shards as write_shards
from memory_support import little_memory

from dvae.data.shards import remote as remotes
from dvae.data.shards.manifest import LIMIT, Manifest
from dvae.data.shards.reader import Shards
from dvae.data.shards.remote import RemoteShards, file_url, read_manifest
from dvae.data.shards.shard_index import index_limit
from dvae.errors import MachineError, UserError

pytestmark = pytest.mark.timeout(60)
NAMES = [
    "", ".", "..", ".x", "-rf", "a b", "a\n", "a\nb", "a;touch x", "a|b", "a&b", "$(a)", "`a`", "a'b", 'a"b', "a/b",
    "../a", "/dev/zero", "a\\b", "a%sb", "a\x00", "ä", "a?b", "a#b", "a*", "a~", "a>b", "@a", "a:b", "x" * 201,
]  # fmt: skip
PLACES = ["pipe:cat /a/%s", "pipe:cat /a", "http://h/a", "s3://b/a", "gs://b/a", "file:///a"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remotes, "RETRY_PAUSE", 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_not_plain_is_never_put_into_a_place(name: str):
    for place in PLACES:
        with pytest.raises(MachineError, match=f"the manifest at {re.escape(place)} names a file "):
            file_url(place, name)


def test_a_plain_name_is_one_word_of_a_command():
    for name in ("train-000000.tar", "_x.npy", "A.b-c_9", "x" * 200):
        (word,) = subprocess.run(["sh", "-c", f"printf '%s\\n' {name}"], capture_output=True, text=True).stdout.split()
        assert word == name
        assert file_url("pipe:cat %s %s", name) == f"pipe:cat {name} {name}"


def endless(folder: Path, name: str) -> str:
    """A command that sends sound files of `folder`, but no end of the file `name`."""
    return f"pipe:case %s in {name}) cat /dev/zero;; *) cat {folder}/%s;; esac"


def test_a_manifest_without_end(tmp_path: Path):
    location = endless(write_shards(tmp_path), "manifest.json")
    with little_memory(), pytest.raises(UserError, match=f"no shards at .*larger than the {LIMIT} bytes"):
        read_manifest(location)
    with (
        little_memory(),
        pytest.raises(MachineError, match=f"manifest.json cannot be fetched .* than the {LIMIT} bytes"),
    ):
        Shards(RemoteShards(location, tmp_path / "to", 1.0))
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("file", ["train-000000.npy", "train-000000.tar"])
def test_an_index_or_a_shard_without_end(tmp_path: Path, file: str):
    (tmp_path / "there").mkdir()
    location = endless(write_shards(tmp_path / "there"), file)
    (shard,) = Manifest.load(tmp_path / "there").splits["train"]
    limit = index_limit(shard) if file == shard.index else shard.bytes
    with (
        little_memory(),
        pytest.raises(MachineError, match=rf"{file} cannot be fetched .*larger than the {limit} b"),
    ):
        Shards(RemoteShards(location, tmp_path / "to", 1.0)).read([0])
    assert sum(path.stat().st_size for path in (tmp_path / "to").rglob("*")) < 2**20


def test_a_damaged_manifest_is_not_kept(tmp_path: Path):
    (tmp_path / "there").mkdir()
    change(write_shards(tmp_path / "there"), its_file="../x.tar")
    remote = RemoteShards(f"pipe:cat {tmp_path}/there/%s", tmp_path / "to", 1.0)
    for _ in range(2):
        with pytest.raises(UserError, match=r"manifest\.json: names a file '\.\./x\.tar'"):
            Shards(remote)
    change(tmp_path / "there", its_file="train-000000.tar")
    assert len(Shards(remote).read([0])) == 1


def test_an_index_that_would_fill_the_disk(tmp_path: Path):
    """The shards fit into the folder here, but the index of so many images would not."""
    (tmp_path / "there").mkdir()
    change(write_shards(tmp_path / "there"), its_count=10**9)
    with pytest.raises(UserError, match="1000000000 samples in"):
        Shards(RemoteShards(f"pipe:cat {tmp_path}/there/%s", tmp_path / "to", 1.0))


def test_a_pipe_in_a_folder_with_an_address(tmp_path: Path):
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(UserError, match="it is a pipe, not a file"):
        read_manifest(f"file://{tmp_path}")


def test_a_pipe_in_the_folder_here_is_replaced(tmp_path: Path):
    (tmp_path / "there").mkdir()
    remote = RemoteShards(f"pipe:cat {write_shards(tmp_path / 'there')}/%s", tmp_path / "to", 1.0)
    expected = Shards(remote, cache_bytes=0).read([0, 1])
    (remote.folder / "train-000000.tar").unlink()
    os.mkfifo(remote.folder / "train-000000.tar")
    assert (Shards(remote, cache_bytes=0).read([0, 1]) == expected).all()


def test_the_manifest_of_a_run_is_the_one_that_it_began_with(tmp_path: Path):
    """A damaged one is removed, a sound one never is."""
    (tmp_path / "there").mkdir()
    remote = RemoteShards(f"pipe:cat {write_shards(tmp_path / 'there')}/%s", tmp_path / "to", 1.0)
    first = remote.manifest()
    change(tmp_path / "there", protocol="another")
    assert remote.manifest() == first
    assert json.loads((tmp_path / "there" / "manifest.json").read_text())["protocol"] == "another"
