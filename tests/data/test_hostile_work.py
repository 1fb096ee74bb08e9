"""Caches, journals of unfinished shards and records that a stranger may have written."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_files import MARK, PNGS, SPECIAL, Executes, npy
from hostile_shards import READERS
from hostile_shards import shards as write_shards
from memory_support import little_memory

from dvae.data.building.cache_build import CacheSpec, build_cache
from dvae.data.building.shard_build import build
from dvae.data.building.staging import StagingFolder
from dvae.data.latent_cache import CachedSample, CacheInfo, LatentCache
from dvae.data.shards.reader import Shards
from dvae.data.shards.tar_files import ShardWriter, seal
from dvae.data.shards.verify import verify
from dvae.errors import MachineError, UserError

pytestmark = pytest.mark.timeout(30)
PATTERNS = {"name": "test_patterns"}
ABOUT = CacheInfo(images=2, draws=1, latent=[2], encoder_sha256="e", images_sha256="i", precision="fp32", seed=0)


def written(folder: Path) -> Path:
    """A cache of two images."""
    images = Shards(write_shards(folder.parent), cache_bytes=0)

    def samples(start: int, stop: int) -> Iterator[CachedSample]:
        for index in range(start, stop):
            yield CachedSample(np.float32([[index, 1]]), [images.read([index])[0].permute(1, 2, 0).numpy()])

    build_cache(folder, CacheSpec(ABOUT, 2, images, samples), lambda done, total: None)
    return folder


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    found = json.loads((folder / "cache.json").read_text())
    (folder / "cache.json").write_text(json.dumps(change(found)))


def shard_field(name: str, value: object) -> Callable[[dict[str, Any]], Any]:
    return lambda found: found | {"shards": [found["shards"][0] | {name: value}]}


RECORDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda found: [found],
    "no shards": lambda found: found | {"shards": []},
    "shards in a mapping": lambda found: found | {"shards": {}},
    "one more field": lambda found: found | {"more": 1},
    "one field less": lambda found: {name: value for name, value in found.items() if name != "latent"},
    "a fraction": lambda found: found | {"draws": 1.5},
    "a shard twice": lambda found: found | {"shards": found["shards"] * 2},
    "a foreign file": shard_field("file", "../../x.tar"),
    "a device": shard_field("index", "/dev/zero"),
    "another count": shard_field("count", 1),
    "10**9 images": shard_field("count", 10**9),
    "a hash that is none": shard_field("sha256", "x"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_of_a_cache(tmp_path: Path, name: str):
    folder = written(tmp_path / "cache")
    changed(folder, RECORDS[name])
    with pytest.raises(MachineError, match="run the cache stage again") as error:
        LatentCache(folder, ABOUT)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["cache.json", "latents-000000.tar", "latents-000000.npy"])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_files_in_a_cache(tmp_path: Path, file: str, name: str):
    folder = written(tmp_path / "cache")
    (folder / file).unlink()
    SPECIAL[name](folder / file)
    with pytest.raises((MachineError, UserError), match="run the cache stage") as error:
        LatentCache(folder, ABOUT)
    assert "\n" not in str(error.value)


def rewritten(folder: Path, members: dict[str, bytes]) -> None:
    """The cache's shard with other members of image 0, and its right hashes in the record."""
    cache = LatentCache(folder, ABOUT)
    old = {f"{kind}": cache.members.read(1, number, 10**6) for number, kind in enumerate(ABOUT.members())}
    writer = ShardWriter(folder / "latents-000000.tar")
    for number, each in enumerate((old | members, old)):
        writer.write(number, each)
    writer.close()
    shard = seal(writer.path, ABOUT.members())
    changed(folder, lambda found: found | {"shards": [vars(shard)]})


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


NUMBERS: dict[str, bytes] = {
    "objects": saved(np.array([[Executes()] * 2], dtype=object)),
    "another type": saved(np.float64([[0, 1]])),
    "another shape": saved(np.float32([[0, 1], [0, 1]])),
    "a shape of 2**62": npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**62}, 2), }}", bytes(8)),
    "text": b"nothing",
    "1 MB": bytes(10**6),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_damaged_numbers_of_a_cache(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    folder = written(tmp_path / "cache")
    rewritten(folder, {"npy": NUMBERS[name]})
    cache = LatentCache(folder, ABOUT)
    zero = torch.tensor([0])
    with little_memory(), pytest.raises(MachineError, match=r"cache shard .*latents-000000\.tar is damaged"):
        cache.reconstructions(zero, zero)
    assert torch.equal(cache.reconstructions(zero + 1, zero)[0], torch.tensor([[1.0, 1.0]]))
    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize("name", PNGS)
def test_damaged_pictures_of_a_cache(tmp_path: Path, name: str):
    """One like those that made torchvision's decoder take the process down would end the tests."""
    folder = written(tmp_path / "cache")
    rewritten(folder, {"0.png": PNGS[name] or b" "})
    zero = torch.tensor([0])
    with little_memory(), pytest.raises(MachineError, match=r"cache shard .*latents-000000\.tar is damaged"):
        LatentCache(folder, ABOUT, (3, 8, 8)).reconstructions(zero, zero)
    with little_memory(), pytest.raises(MachineError, match=r"cache shard .*latents-000000\.tar is damaged"):
        LatentCache(folder, ABOUT).reconstructions(torch.tensor([0, 1]), torch.tensor([0, 0]))


def begun(out: Path) -> StagingFolder:
    """Shards of which two jobs of seven images are finished."""

    def progress(done: int, total: int) -> None:
        if done == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(PATTERNS, 8, out, 0.2, shard_size=7, workers=1, progress=progress)
    return StagingFolder(out, out.with_name(f".{out.name}.building"))


def _job(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        journal = json.loads(path.read_text())
        path.write_text(json.dumps(journal | {"job": change(journal["job"])}))

    return write


def _shard(**fields: object) -> Callable[[Path], None]:
    return _job(lambda job: job | {"shards": {split: row | fields for split, row in job["shards"].items()}})


def _instead(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.unlink()
        make(path)

    return write


JOURNALS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: path.write_text("nothing") and None,
    "null": lambda path: path.write_text("null") and None,
    "a key twice": lambda path: path.write_text('{"job": {}, "job": {}, "request": ""}') and None,
    "no job": _job(lambda job: None),
    "a list": _job(lambda job: [job]),
    "one more field": _job(lambda job: job | {"more": 1}),
    "a fraction of images": _job(lambda job: job | {"images": 7.5}),
    "damage that is no text": _job(lambda job: job | {"damaged": [7]}),
    "another split": _job(lambda job: job | {"shards": {"more": job["shards"]["train"]}}),
    "a foreign file": _shard(file="../../thesis.tar"),
    "a foreign index": _shard(index="/dev/zero"),
    "a negative count": _shard(count=-7),
    "10**9 images": _shard(count=10**9),
    **{name: _instead(SPECIAL[name]) for name in ("a pipe", "a folder", "a link to zeros")},
}


@pytest.mark.parametrize("name", JOURNALS)
def test_a_journal_that_no_build_wrote_is_made_again(tmp_path: Path, name: str):
    whole, out = tmp_path / "whole", tmp_path / "out"
    build(PATTERNS, 8, whole, 0.2, shard_size=7, workers=1)
    hidden = begun(out)
    (tmp_path / "thesis.tar").write_text("mine")
    JOURNALS[name](hidden.journal(1))
    calls: list[int] = []
    build(PATTERNS, 8, out, 0.2, shard_size=7, workers=1, progress=lambda done, total: calls.append(done))
    assert calls[0] == 7
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }
    assert (tmp_path / "thesis.tar").read_text() == "mine"


@pytest.mark.parametrize("name", ["a pipe", "a folder", "a link to zeros", "an empty file"])
def test_a_request_that_is_no_file(tmp_path: Path, name: str):
    from dvae.data.building.shard_build import build_part

    hidden = begun(tmp_path / "out")
    (hidden.path / "request.json").unlink()
    SPECIAL[name](hidden.path / "request.json")
    with pytest.raises(UserError, match=r"request\.json: .*: remove ") as error:
        build_part(PATTERNS, 8, tmp_path / "out", 0, 2, heldout_fraction=0.2, shard_size=7, workers=1)
    assert "\n" not in str(error.value)


def test_a_link_in_an_unfinished_folder_is_removed_and_what_it_leads_to_stays(tmp_path: Path):
    hidden = begun(tmp_path / "out")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("mine")
    (hidden.path / "work-x").symlink_to(tmp_path / "thesis")
    build(PATTERNS, 8, tmp_path / "out", 0.2, shard_size=7, workers=1)
    assert (tmp_path / "thesis" / "a.tex").read_text() == "mine"


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("file", ["train-000000.tar", "train-000000.npy"])
def test_verify_names_special_files(tmp_path: Path, name: str, file: str):
    folder = write_shards(tmp_path)
    (folder / file).unlink()
    SPECIAL[name](folder / file)
    with pytest.raises(UserError, match=rf"shards at .* are damaged: .*{file} ") as error:
        verify(folder)
    assert "\n" not in str(error.value)


def test_verify_names_an_index_of_another_shape(tmp_path: Path):
    folder = write_shards(tmp_path)
    data = saved(np.zeros((2, 6), np.int64))
    (folder / "train-000000.npy").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"][0]["index_sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"train-000000\.npy holds int64 \(2, 6\), not int64 \(2, 4\)"):
        verify(folder)


def test_a_shard_that_became_a_pipe_after_it_was_opened(tmp_path: Path):
    data = Shards(write_shards(tmp_path), cache_bytes=0)
    (tmp_path / "train-000000.tar").unlink()
    os.mkfifo(tmp_path / "train-000000.tar")
    with pytest.raises(MachineError, match=r"train-000000\.tar: is a pipe, not a file: restore it"):
        data.read([0])


def test_text_beside_an_image_that_cannot_be_read_is_named(tmp_path: Path):
    data = Shards(write_shards(tmp_path, about=b"{"))
    with pytest.raises(MachineError, match=r"train-000000\.tar: key and labels of image 0 cannot be read"):
        data.info(0)
    with pytest.raises(MachineError, match="labels of image 0"):
        READERS["shards"](tmp_path)


def test_damage_recorded_for_other_shards_is_named(tmp_path: Path):
    data = Shards(write_shards(tmp_path), max_bad_fraction=0.9)
    for index in (-1, 2, 10**12):
        with pytest.raises(MachineError, match=f"image {index} is recorded as damaged, but .* has 2 images"):
            data.add_damaged({index: "x"})
