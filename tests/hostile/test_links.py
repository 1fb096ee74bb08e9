"""Links in a folder that a stranger gives: nothing elsewhere is written, emptied or removed through them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests_support import Tool

from dvae.data.building.shard_build import build
from dvae.errors import MachineError, UserError
from dvae.utils import atomic_files
from dvae.utils.read import DamagedFile

FOLDERS = (
    "cache",
    "images",
    "weights",
    "checkpoints",
    "checkpoints/encoder",
    "snapshots",
    "remote",
    "bundle",
    "latents",
)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder of the user's, with names that look like leftovers."""
    folder = tmp_path / "mine"
    (folder / ".mozilla.old").mkdir(parents=True)
    for name in (".mozilla.old/profile", ".bashrc.old", "thesis.txt", "a.npz", ".config.tmp"):
        (folder / name).write_text("precious")
    return folder


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_a_run_that_is_a_link_is_refused(name: str, mine: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / name).parent.mkdir(parents=True)
    (run / name).symlink_to(mine)
    with pytest.raises(DamagedFile, match=f"{name} is a link to a folder|{name}: is a link to a folder"):
        atomic_files.refuse_links(run, ("shards", "wandb"))
    (run / name).unlink()
    (run / "shards").symlink_to(mine)
    atomic_files.refuse_links(run, ("shards", "wandb"))


def test_launch_writes_and_removes_nothing_through_links(
    mine: Path, tmp_path: Path, tiny: list[str], tool: Tool
) -> None:
    words = [*tiny, "stages=[shards,encoder]", "run=run"]
    assert tool("launch", *words).returncode == 0
    before = content(mine)
    for name in ("cache", "images", "weights"):
        shutil.rmtree(tmp_path / "run" / name, ignore_errors=True)
        (tmp_path / "run" / name).symlink_to(mine)
        done = tool("launch", *words, "stages=[shards,encoder,prior]")
        assert done.returncode == 1
        assert f"run/{name}: is a link to a folder" in done.stderr
        assert len([line for line in done.stderr.splitlines() if "error" in line]) == 1
        (tmp_path / "run" / name).unlink()
    assert content(mine) == before


def test_only_what_dvae_left_unfinished_is_removed(mine: Path) -> None:
    (mine / ".x.npz.abcd1234.tmp.npz").write_text("left")
    (mine / ".folder.zyxw9876.old").mkdir()
    before = content(mine)
    atomic_files.remove_leftovers(mine)
    del before[".x.npz.abcd1234.tmp.npz"]
    assert content(mine) == before
    assert not (mine / ".folder.zyxw9876.old").exists()


def test_the_hidden_folder_of_a_result_may_not_be_a_link(mine: Path, tmp_path: Path) -> None:
    from dvae.inference.generation.chunks import ChunkStore

    (tmp_path / ".x.npy.drawing").symlink_to(mine)
    before = content(mine)
    with pytest.raises(UserError, match="is a link to another folder"), ChunkStore.opened(tmp_path / "x.npy", {}):
        pass
    with pytest.raises(UserError, match="is a link to another folder"):
        ChunkStore.remove_at(tmp_path / "x.npy")
    assert content(mine) == before


def test_shards_from_elsewhere_are_kept_in_no_link(mine: Path, tmp_path: Path) -> None:
    from dvae.data.shards.remote import RemoteShards

    build({"name": "avatars", "n": 12}, 16, tmp_path / "shards", 0.2, workers=1)
    remote = RemoteShards(f"pipe:cat {tmp_path / 'shards'}/%s", tmp_path / "kept", 1.0)
    remote.folder.mkdir(parents=True)
    (remote.folder / ".room").symlink_to(mine / "thesis.txt")
    before = content(mine)
    with pytest.raises((OSError, MachineError)):
        remote.manifest()
    assert content(mine) == before
    shutil.rmtree(remote.folder)
    remote.folder.symlink_to(mine)
    with pytest.raises(UserError, match="is a link to another folder"):
        remote.manifest()
    assert content(mine) == before
