"""Commands that are given images: the same bits in every request, what is kept exactly, and mistakes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests_support import ROOT, environment

import dvae
from dvae.errors import UserError
from dvae.inference.directions import Direction, DirectionMethod, save
from dvae.inference.generation.chunks import ChunkStore
from dvae.inference.generation.edit_tasks import EditTask, InpaintTask, InterpolateTask, ReconstructTask
from dvae.inference.generation.generate import generate_to_file
from dvae.inference.generation.generation_settings import (
    EditConfig,
    InpaintConfig,
    InterpolateConfig,
    ReconstructConfig,
)
from dvae.inference.generation.task import GenerationTask
from dvae.tools import edit, inpaint, interpolate, reconstruct

COMMANDS: dict[str, tuple[type[GenerationTask], Any, dict[str, object]]] = {
    "reconstruct": (ReconstructTask, ReconstructConfig, {}),
    "interpolate": (InterpolateTask, InterpolateConfig, {"steps": 3}),
    "edit": (EditTask, EditConfig, {"direction": "wide", "strengths": [0.0, 2.0]}),
    "inpaint": (InpaintTask, InpaintConfig, {"mask": "left"}),
}
PER = {"interpolate": 2}


@pytest.fixture(scope="module", autouse=True)
def wide(run: Path, kinds: dict[str, Path]) -> torch.Tensor:
    """A direction of each run, the same for those whose latent is a vector."""
    for place in (run, *kinds.values()):
        shape = dvae.load(place).models.shapes.latent
        vector = torch.linspace(-1, 1, int(np.prod(shape))).view(shape)
        save(place, [Direction("wide", vector, DirectionMethod.labels, unit="one")])
    return torch.linspace(-1, 1, 8)


def draw(command: str, run: Path, out: Path, images: object, **words: object) -> np.ndarray:
    """What a command writes, (n, H, W, C)."""
    task_class, kind, own = COMMANDS[command]
    generate_to_file(kind(run=str(run), out=str(out), images=str(images), seed=3, **own | words), task_class)
    return np.load(out)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_same_bits_in_every_request(command: str, run: Path, faces: Path, tmp_path: Path) -> None:
    whole = draw(command, run, tmp_path / "whole.npy", faces)
    count = 20 // PER.get(command, 1)
    assert len(whole) == count
    assert len(np.unique(whole.reshape(count, -1), axis=0)) == count
    for place, (first, n) in enumerate(((0, 1), (3, 4), (count - 2, 2))):
        part = draw(command, run, tmp_path / f"{place}.npy", faces.with_suffix(".npy"), first=first, n=n)
        assert np.array_equal(part, whole[first : first + n])
    for batch in (1, 7, 64):
        other = draw(command, run, tmp_path / f"batch{batch}.npy", faces, batch=batch)
        # gray levels that round the other way; rarely more, since an untrained network may amplify them
        assert (np.abs(other.astype(int) - whole.astype(int)) > 1).mean() < 0.01


@pytest.mark.slow
def test_two_processes_and_a_kill_give_the_same_file(run: Path, faces: Path, tmp_path: Path) -> None:
    whole = draw("edit", run, tmp_path / "whole.npy", faces, sampler={"steps": 40})
    out = tmp_path / "x.npy"
    words = [f"run={run}", f"images={faces}", f"out={out}", "seed=3", "direction=wide", "strengths=[0,2]"]
    command = [sys.executable, str(ROOT / "tools" / "edit.py"), *words, "sampler.steps=40"]
    victim = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, cwd=tmp_path)
    under_way = ChunkStore.folder_of(out)
    while not list(under_way.glob("0*.npz")):
        assert victim.poll() is None, victim.communicate()
        time.sleep(0.002)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert not out.exists()
    done = subprocess.run([*command, "processes=2"], env=environment(), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "20 edited images, 40 network evaluations each, " in done.stdout
    assert " drawn now at " in done.stdout
    assert np.array_equal(np.load(out), whole)


def test_strength_0_and_the_ends_of_strips_are_reconstructions(run: Path, faces: Path, tmp_path: Path) -> None:
    for name in ("run", "drawn"):
        images = faces if name == "run" else "drawn"
        if name == "run":
            plain = draw("reconstruct", run, tmp_path / "plain.npy", images)
        else:
            plain = dvae.load(run).generate(20, 3)[1].permute(0, 2, 3, 1).numpy()
        edits = draw("edit", run, tmp_path / f"edit{name}.npy", images, n=20)
        strips = draw("interpolate", run, tmp_path / f"strips{name}.npy", images, n=10)
        assert np.array_equal(edits[:, :, :16], plain)
        assert not np.array_equal(edits[:, :, 16:], plain)
        assert np.array_equal(strips[:, :, :16], plain[::2])
        assert np.array_equal(strips[:, :, 32:], plain[1::2])


@pytest.mark.parametrize("mask", ["left", "border", "FILE"])
def test_known_pixels_are_kept_exactly(mask: str, run: Path, faces: Path, tmp_path: Path) -> None:
    known = np.zeros((16, 16), bool)
    if mask == "FILE":
        known[3:5, 2:9] = True
        Image.fromarray(known.astype(np.uint8) * 255).save(tmp_path / "mask.png")
        mask = str(tmp_path / "mask.png")
    elif mask == "left":
        known[:, :8] = True
    else:
        known[:] = True
        known[4:12, 4:12] = False
    drawn = draw("inpaint", run, tmp_path / "x.npy", faces, mask=mask)
    images = np.load(faces.with_suffix(".npy"))
    assert np.array_equal(drawn[:, known], images[:, known])
    assert (drawn[:, ~known] != images[:, ~known]).mean() > 0.9


def test_pictures_show_what_was_given(run: Path, faces: Path, tmp_path: Path) -> None:
    sizes = {"reconstruct": (2, 3), "edit": (4, 3), "interpolate": (4, 5), "inpaint": (2, 4)}
    images = np.load(faces.with_suffix(".npy"))
    for command, (rows, columns) in sizes.items():
        task_class, kind, own = COMMANDS[command]
        out, n = tmp_path / f"{command}.png", 4 if rows == 2 else 2
        generate_to_file(kind(run=str(run), out=str(out), images=str(faces), n=n, **own), task_class)
        picture = np.asarray(Image.open(out))[:, :, :3]
        wide = columns if rows == 4 else columns * 2
        assert picture.shape[:2] == (17 * rows - 1, 17 * wide - 1), command
        assert np.array_equal(picture[:16, :16], images[0])


@pytest.mark.parametrize("kind", ["psld", "latent", "classes"])
def test_other_runs_from_the_bundle_alone(
    kind: str, kinds: dict[str, Path], faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "elsewhere"
    shutil.copytree(kinds[kind], place / "bundle")
    monkeypatch.chdir(place)
    given = [f"images={faces}", "n=2", "run=bundle", "seed=3"]
    reconstruct.command([*given, "out=r.npy"])
    edit.command([*given, "out=e.npy", "direction=wide", "strength=0"])
    assert np.array_equal(np.load("e.npy"), np.load("r.npy"))
    edit.command([*given, "out=e2.npy", "direction=wide", "strength=3"])
    assert not np.array_equal(np.load("e2.npy"), np.load("r.npy"))
    drawn = dvae.load("bundle").generate(2, 3)[1].permute(0, 2, 3, 1).numpy()
    interpolate.command(["run=bundle", "images=drawn", "n=1", "seed=3", "space=both", "steps=4", "out=i.npy"])
    strip = np.load("i.npy").reshape(16, 4, 16, 3)
    assert np.array_equal(strip[:, 0], drawn[0])
    assert np.array_equal(strip[:, 3], drawn[1])
    if kind == "latent":
        with pytest.raises(UserError, match="in latent space a given image has no noise to interpolate"):
            interpolate.command([*given, "n=1", "out=j.npy"])
        with pytest.raises(UserError, match=r"inpainting: not defined for denoiser\.space=latent"):
            inpaint.command([*given, "out=p.npy"])
        return
    interpolate.command([*given, "n=1", "steps=4", "out=j.npy"])
    assert np.array_equal(np.load("j.npy").reshape(16, 4, 16, 3)[:, 3], np.load("r.npy")[1])
    inpaint.command([*given, "out=p.npy"])
    assert np.array_equal(np.load("p.npy")[:, :4], np.load(faces.with_suffix(".npy"))[:2, :4])


@pytest.mark.parametrize("form", ["zip", "file", "resized"])
def test_where_images_may_lie(form: str, run: Path, faces: Path, tmp_path: Path) -> None:
    wanted = draw("reconstruct", run, tmp_path / "wanted.npy", faces, n=1)
    words: dict[str, object] = {}
    place = faces / "00.png"
    if form == "zip":
        place = tmp_path / "x.zip"
        with zipfile.ZipFile(place, "w") as archive:
            archive.write(faces / "00.png", "00.png")
    elif form == "resized":
        place, words = tmp_path / "big.png", {"resize": True}
        small = Image.open(faces / "00.png")
        wide = Image.new("RGB", (64, 48))
        wide.paste(small.resize((48, 48), Image.Resampling.NEAREST), (8, 0))
        wide.save(place)
    drawn = draw("reconstruct", run, tmp_path / "x.npy", place, **words)
    assert len(drawn) == 1
    if form != "resized":
        assert np.array_equal(drawn, wanted)


@pytest.mark.parametrize(
    ("tool", "words", "message"),
    [
        (reconstruct, ["images=nowhere"], "images=nowhere does not exist"),
        (reconstruct, ["images=EMPTY"], r"holds no images \(it is empty\)"),
        (
            reconstruct,
            ["images=BIG"],
            "big.png is 32x24, the run's images are 16x16: add resize=true to crop and scale",
        ),
        (reconstruct, ["images=GRAY"], "gray.png is gray, the run's images are color: add resize=true to convert it"),
        (reconstruct, ["images=DAMAGED"], "damaged.png is not an image that can be read"),
        (reconstruct, ["images=FACES", "n=21"], r"n=21 first=0: images=.* holds 20, numbered from 0"),
        (interpolate, ["images=FACES", "n=11"], r"n=11 first=0: images=.* makes 10"),
        (interpolate, ["images=FACES", "steps=1"], "steps=1: use 2 or more"),
        (interpolate, ["images=FACES", "space=x"], "space=x: Invalid value 'x'"),
        (reconstruct, [], r"run=.* is a bundle and has no images: name the run's with shards=FOLDER, or give images="),
        (reconstruct, ["images=drawn"], "images=drawn: generated images need no reconstruction"),
        (edit, ["images=FACES", "direction=wild"], "direction=wild: .* has no such direction: did you mean 'wide'"),
        (edit, ["images=FACES"], "not set: direction; add direction=..."),
        (inpaint, ["images=FACES", "mask=midle"], "mask=midle: .*, or a PNG that is white where the image is known"),
        (inpaint, ["images=FACES", "mask=WHITE"], "is all white: white is known, black drawn anew"),
        (inpaint, ["images=FACES", "mask=BIG"], "big.png is 32x24, the run's images are 16x16"),
        (
            inpaint,
            ["images=FACES", "sampler=ode"],
            "inpainting needs a sampler that moves all images in the same steps",
        ),
    ],
)
def test_mistakes_are_one_line_about_images(
    tool: Any,
    words: list[str],
    message: str,
    run: Path,
    faces: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Image.new("RGB", (32, 24)).save("big.png")
    Image.new("L", (16, 16)).save("gray.png")
    Image.new("L", (16, 16), 255).save("white.png")
    Path("damaged.png").write_bytes(b"none")
    places = {"EMPTY": "empty", "BIG": "big.png", "GRAY": "gray.png", "DAMAGED": "damaged.png", "WHITE": "white.png"}
    for name, place in (places | {"FACES": str(faces)}).items():
        words = [word.replace(name, place) for word in words]
    with pytest.raises(UserError, match=message) as refusal:
        tool.command([f"run={run}", "out=x.npy", *words])
    assert "\n" not in str(refusal.value)
    assert not Path("x.npy").exists()


def test_a_mistake_ends_a_tool_with_status_2(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "inpaint.py"), f"run={run}", "images=none.png"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("dvae: error: images=none.png")
    assert not os.listdir(tmp_path)
