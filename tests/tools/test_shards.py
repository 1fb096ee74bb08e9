"""tools/shards.py: build and verify, and one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from dvae.errors import run_command
from dvae.tools import shards


def failure(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line, after any progress, on stderr of a command that ends with exit status 2."""
    with pytest.raises(SystemExit) as end:
        run_command(shards.command, list(words))
    assert end.value.code == 2
    *progress, line = capsys.readouterr().err.splitlines()
    assert all(text.startswith("shards: ") for text in progress)
    return line


def test_build_then_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "shards"
    words = [
        "build",
        "source=avatars",
        "source.n=20",
        "source.style=personas",
        "size=16",
        f"out={out}",
        "heldout_fraction=0.3",
    ]
    shards.command(words)
    printed = capsys.readouterr()
    assert "shards: 20/20 100%" in printed.err
    assert "20 images of 16x16" in printed.out
    assert "images/s" in printed.out
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["image_size"], manifest["heldout_fraction"], manifest["source"]["style"]) == (16, 0.3, "personas")
    shards.command(words)
    again = capsys.readouterr()
    assert ("were there already" in again.out, again.err) == (True, "")
    shards.command(["verify", str(out)])
    assert "2 shards are sound" in capsys.readouterr().out
    (out / "train-000000.tar").unlink()
    assert "train-000000.tar is missing" in failure(capsys, "verify", str(out))


def test_a_folder_with_a_damaged_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "in").mkdir()
    for i in range(10):
        Image.new("RGB", (40, 50), (i, i, i)).save(tmp_path / "in" / f"{i}.png")
    (tmp_path / "in" / "3.png").write_bytes(b"no")
    words = ["build", "source=folder", f"source.path={tmp_path / 'in'}", "size=8", f"out={tmp_path / 'out'}"]
    assert "3.png" in failure(capsys, *words)
    assert not (tmp_path / "out").exists()
    shards.command([*words, "max_bad_fraction=0.2"])
    assert "1 damaged" in capsys.readouterr().out


def test_parts_then_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "shards"
    words = ["build", "source=avatars", "source.n=20", "size=16", "shard_size=6", f"out={out}"]
    for _ in range(2):
        shards.command([*words, "part=1", "parts=3"])
    first, again = capsys.readouterr().out.split("shards: ")[1:]
    assert first.startswith("part=1 parts=3 has 6 images, all made\n  6 images in ")
    assert again.endswith(
        "  all of them were there already\n"
        "  when all parts are made: the same command without part= and parts= publishes the shards\n"
    )
    shards.command(words)
    assert "14 images in" in capsys.readouterr().out
    shards.command([*words, "part=2", "parts=3"])
    assert capsys.readouterr().out.endswith("has 8 images, all made\n  all of them were there already\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["biuld"], "did you mean 'build'"),
        (["build"], "not set: out; add out=..."),
        (["build", "out=x", "source=avatar"], "did you mean 'avatars'"),
        (["build", "out=x", "source.stlye=3"], "did you mean 'style'"),
        (["build", "out=x", "sise=3"], "did you mean 'size'"),
        (["build", "out=x", "size=big"], "size"),
        (["build", "out=x", "source=folder"], "not set: source.path; add source.path=..."),
        (["build", "out=x", "source=folder", "source.path=nowhere"], "nowhere does not exist"),
        (["build", "out=x", "plugins=[no_such_module]"], "no_such_module"),
        (["build", "out=x", "parts=4"], "say which, part=0 to part=3"),
        (["build", "out=x", "part=4", "parts=4"], "part=4: use 0 to 3"),
        (["verify"], "one folder"),
        (["verify", "nowhere"], "no shards at nowhere"),
    ],
)
def test_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], says: str
):
    monkeypatch.chdir(tmp_path)
    assert says in failure(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        shards.command(["--help"])
    assert end.value.code == 0
    assert "avatars, celeba" in capsys.readouterr().out
