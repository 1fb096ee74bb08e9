"""Drawing many images: forms, going on after a kill, processes, requests that do not fit."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from tests_support import ROOT, environment

import dvae
from dvae.errors import MachineError, UserError
from dvae.inference.generation import worker_pool
from dvae.inference.generation.chunks import ChunkStore
from dvae.inference.generation.generate import generate_to_file
from dvae.inference.generation.generation_settings import SampleConfig
from dvae.inference.noise import SharedVariable
from dvae.tools import sample
from dvae.utils import atomic_files
from dvae.utils.child_processes import ChildGroup


@pytest.fixture(scope="module")
def expected(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """(VAE samples, refined samples) of seed 3, (40, H, W, C)."""
    vae, refined = dvae.load(run).generate(40, seed=3)
    assert vae is not None
    return vae.permute(0, 2, 3, 1).numpy(), refined.permute(0, 2, 3, 1).numpy()


def asked(run: Path, out: Path | str, **words: object) -> SampleConfig:
    return SampleConfig(**{"run": str(run), "out": str(out), "n": 20, "seed": 3, **words})  # type: ignore[arg-type]


def test_every_form_holds_the_same_images(run: Path, expected: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    both = np.concatenate(expected, 2)
    for first, vae, wanted in ((0, False, expected[1][:20]), (17, True, both[17:37])):
        outs = [f"{tmp_path}/{first}{end}" for end in ("/", ".npy", ".zip", ".tar")]
        for out in outs:
            done = generate_to_file(asked(run, out, first=first, vae=vae))
            assert (done.nfe, done.generated) == (2, 20)
        names = [f"{number:06d}.png" for number in range(first, first + 20)]
        folder = Path(outs[0])
        assert sorted(path.name for path in folder.iterdir()) == names
        assert np.array_equal(np.stack([np.asarray(Image.open(folder / name)) for name in names]), wanted)
        assert np.array_equal(np.load(outs[1]), wanted)
        with zipfile.ZipFile(outs[2]) as archive:
            assert archive.namelist() == names
            assert all(archive.read(name) == (folder / name).read_bytes() for name in names)
            assert {item.compress_type for item in archive.infolist()} == {zipfile.ZIP_STORED}
        shard = list(webdataset.WebDataset(outs[3], shardshuffle=False))
        assert [item["__key__"] for item in shard] == [f"{number:09d}" for number in range(first, first + 20)]
        assert [item["png"] for item in shard] == [(folder / name).read_bytes() for name in names]
        assert json.loads(Path(f"{outs[1]}.json").read_text())["nfe"] == 2
    assert not list(tmp_path.glob(".*"))


def test_a_picture_shows_both_and_is_replaced(
    run: Path, expected: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    out = tmp_path / "grid.png"
    generate_to_file(asked(run, out, n=2, seed=4))
    generate_to_file(asked(run, out, n=2))
    picture = np.asarray(Image.open(out))[:, :, :3]
    assert picture.shape == (16, 4 * 17 - 1, 3)
    cells = [picture[:, start : start + 16] for start in range(0, 68, 17)]
    for cell, wanted in zip(cells, (expected[0][0], expected[1][0], expected[0][1], expected[1][1]), strict=True):
        assert np.array_equal(cell, wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def start(run: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tools" / "sample.py"), f"run={run}", "seed=3", *words]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=run.parent
    )


@pytest.mark.parametrize(("kill_at", "n"), [(96, 320), pytest.param(300, 1000, marks=pytest.mark.slow)])
def test_killed_and_gone_on_with_by_two_processes(run: Path, tmp_path: Path, kill_at: int, n: int) -> None:
    out = tmp_path / "images"
    victim = start(run, f"out={out}/", f"n={n}")
    under_way = ChunkStore.folder_of(out)
    while 16 * len(list(under_way.glob("0*.npz"))) < kill_at:
        assert victim.poll() is None, victim.communicate()
        time.sleep(0.002)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    kept = 16 * len(list(under_way.glob("0*.npz")))
    assert kept < n - 16
    assert not out.exists()
    with pytest.raises(
        UserError, match=r"is unfinished, with seed=3, this asks for 4: name another, or remove .*drawing"
    ):
        generate_to_file(asked(run, f"{out}/", n=n, seed=4))
    with pytest.raises(UserError, match=r"unfinished, with sampler\.steps=2, this asks for 3"):
        generate_to_file(asked(run, f"{out}/", n=n, sampler={"steps": 3}))

    resumed = start(run, f"out={out}/", f"n={n}", "processes=2")
    said, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    drawn = re.search(rf"{n} samples, 2 network evaluations each, (\d+) drawn now at .* images/s", said)
    assert drawn, said
    assert int(drawn[1]) == n - kept
    assert not under_way.exists()

    straight = tmp_path / "straight"
    generate_to_file(asked(run, f"{straight}/", n=n))
    hashes = [{path.name: atomic_files.sha256(path) for path in folder.iterdir()} for folder in (out, straight)]
    assert len(hashes[0]) == n
    assert hashes[0] == hashes[1]
    assert generate_to_file(asked(run, f"{out}/", n=n)).generated == 0


def test_more_may_be_asked_for_while_it_is_under_way(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.npy"
    drawn: list[range] = []
    write = ChunkStore.write

    def ends_at_the_third(self: ChunkStore, numbers: range, arrays: dict[str, np.ndarray]) -> None:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(numbers)
        write(self, numbers, arrays)

    with monkeypatch.context() as patched:
        patched.setattr(ChunkStore, "write", ends_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            generate_to_file(asked(run, out, n=33))
    assert drawn == [range(16), range(16, 32)]
    assert generate_to_file(asked(run, out, n=40)).generated == 8
    assert len(np.load(out)) == 40


def test_a_batch_size_is_within_a_gray_level(
    run: Path, expected: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    generate_to_file(asked(run, tmp_path / "x.npy", n=40, batch=7))
    assert np.abs(np.load(tmp_path / "x.npy").astype(int) - expected[1].astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["n=0"], "n=0: use 1 or more"),
        (["first=-1"], "first=-1: use 0 or more"),
        (["processes=0"], "processes=0: use 1 or more"),
        (["batch=0"], "batch=0: use 1 or more, or leave it out"),
        (["out=x.gif"], r"out=x\.gif: use a name that ends with \.png"),
        (["out=x.png", "n=5000"], r"out=x\.png is one picture, too small for n=5000 \(at most 1024\)"),
        (["label=cat"], "label=cat: this run has no classes"),
        (["sampler.stps=3"], r"sampler\.stps is not a field of 'ddim'"),
        (["guidance=2"], "guidance=2.0 needs a refiner trained with"),
        (["intermediate=3"], "intermediate=3 is more than the 2 steps of the sampler"),
        (["intermediate=1", "sampler=ode"], "intermediate images need a sampler that moves all in the same steps"),
        (["shared=x"], "shared=x: Invalid value 'x', expected one of"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as refusal:
        sample.command([f"run={run}", *words])
    assert "\n" not in str(refusal.value)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


def test_what_is_there_is_kept(run: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "folder"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("all of it")
    with pytest.raises(UserError, match="is there already, and not from this command"):
        generate_to_file(asked(run, foreign))
    out = tmp_path / "x.npy"
    generate_to_file(asked(run, out, n=3))
    before = hashlib.sha256(out.read_bytes()).hexdigest()
    with pytest.raises(UserError, match="generated with n=3, this asks for 4"):
        generate_to_file(asked(run, out, n=4))
    assert generate_to_file(asked(run, out, n=3)).generated == 0
    assert hashlib.sha256(out.read_bytes()).hexdigest() == before
    with ChunkStore.opened(tmp_path / "y.npy", {}), pytest.raises(UserError, match="another command draws it now"):
        generate_to_file(asked(run, tmp_path / "y.npy"))


def test_a_chunk_without_a_request_is_not_trusted(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.npy"
    chunks = ChunkStore(ChunkStore.folder_of(out))
    chunks.write(range(16), {"pixels": np.zeros((16, 16, 16, 3), np.uint8), "nfe": np.ones(16)})
    assert generate_to_file(asked(run, out, n=3)).generated == 3
    assert np.load(out).any()


def test_a_damaged_chunk_is_named(tmp_path: Path) -> None:
    chunks = ChunkStore(tmp_path)
    chunks.write(range(2), {"pixels": np.zeros((2, 4, 4, 3), np.uint8), "nfe": np.ones(2)})
    data = bytearray(chunks.path(range(2)).read_bytes())
    data[200] ^= 1
    chunks.path(range(2)).write_bytes(data)
    with pytest.raises(MachineError, match=r"000000000-000000002\.npz is damaged .*: remove it"):
        chunks.read(range(2), "pixels")


def generate_three_then(how: Callable[[], None], send: Callable[[range | None], None]) -> None:
    send(None)
    send(range(3))
    how()


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("how", "message", "kind"),
    [
        (os.abort, "process 1 was ended by SIGABRT: finished images are kept, run the same command", MachineError),
        (partial(os._exit, 0), "process 1 ended with status 0: finished images are kept", MachineError),
        (partial(fail, UserError("n=0: use 1")), "^n=0: use 1$", UserError),
        (partial(fail, MachineError("the disk is full")), "process 1: the disk is full; finished images", MachineError),
    ],
)
def test_a_process_that_ends_early_ends_the_command(
    how: Callable[[], None], message: str, kind: type[Exception]
) -> None:
    told: list[range | None] = []
    with ChildGroup() as workers:
        workers.start_function(1, generate_three_then, how)
        with pytest.raises(kind, match=message):
            worker_pool.watch_workers(workers, told.append)
    assert told == [None, range(3)]


def test_a_shard_of_drawn_images_keeps_their_classes(kinds: dict[str, Path], tmp_path: Path) -> None:
    generate_to_file(asked(kinds["classes"], tmp_path / "x.tar"))
    items = list(webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False))
    drawn = dvae.load(kinds["classes"]).sample_conditioning(20, seed=3).label
    assert drawn is not None
    names = [json.loads(item["json"])["labels"]["kind"] for item in items]
    assert names == [("cat", "dog")[number] for number in drawn.tolist()]
    assert set(names) == {"cat", "dog"}


@pytest.mark.parametrize("kind", ["run", "psld"])
def test_denoised_estimates_stand_beside_the_image(
    kind: str, run: Path, kinds: dict[str, Path], tmp_path: Path
) -> None:
    place = kinds.get(kind, run)
    words = {"n": 2, "sampler": {"steps": 4}, "vae": False}
    generate_to_file(asked(place, tmp_path / "x.npy", **words))
    done = generate_to_file(asked(place, tmp_path / "y.npy", intermediate=4, **words))
    assert done.nfe == 4  # looking on costs nothing
    tiles = np.load(tmp_path / "y.npy").reshape(2, 16, 5, 16, 3)
    final = np.load(tmp_path / "x.npy")
    assert np.array_equal(tiles[:, :, 4], final)
    assert np.array_equal(tiles[:, :, 3], final)  # the last step takes the predicted image as it is
    assert not np.array_equal(tiles[:, :, 0], final)


def test_shared_z_and_shared_noise(run: Path, expected: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    for shared in SharedVariable:
        generate_to_file(asked(run, tmp_path / f"{shared.name}.npy", shared=shared, vae=True, first=3))
    z, noise = (np.load(tmp_path / f"{name}.npy") for name in ("z", "noise"))
    assert (z[:, :, :16] == expected[0][0]).all()
    assert np.array_equal(noise[:, :, :16], expected[0][3:23])
    for drawn in (z, noise):
        assert len(np.unique(drawn[:, :, 16:].reshape(20, -1), axis=0)) == 20
        assert not np.array_equal(drawn[:, :, 16:], expected[1][3:23])
    generate_to_file(asked(run, tmp_path / "z0.npy", shared=SharedVariable.z, n=1))
    assert np.array_equal(np.load(tmp_path / "z0.npy")[0], expected[1][0])
