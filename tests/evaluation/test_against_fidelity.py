"""Figures of folders of images are those of torch-fidelity's own command line, to the last bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests_support import environment

from dvae.errors import UserError
from dvae.evaluation import metrics
from dvae.tools import evaluate

NAMES = {
    "frechet_inception_distance": ("FID", "per_seed"),
    "kernel_inception_distance_mean": ("KID", "per_seed"),
    "kernel_inception_distance_std": ("KID", "subset_std"),
    "inception_score_mean": ("IS", "per_seed"),
    "inception_score_std": ("IS", "split_std"),
    "precision": ("precision", "per_seed"),
    "recall": ("recall", "per_seed"),
}


def random_weights() -> dict[str, torch.Tensor]:
    """Weights of torch-fidelity's Inception, drawn so that activations neither vanish nor explode."""
    generator = torch.Generator().manual_seed(0)

    def drawn(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith("num_batches_tracked"):
            return torch.zeros(shape, dtype=torch.int64)
        if len(shape) > 1:
            return torch.randn(shape, generator=generator) * (2.0 / np.prod(shape[1:])) ** 0.5
        return torch.ones(shape) if name.endswith(("bn.weight", "running_var")) else torch.zeros(shape)

    return {name: drawn(name, shape) for name, shape in metrics.inception_shapes().items()}


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(random_weights(), path)
    return path


def folder_of(path: Path, images: np.ndarray) -> Path:
    """PNGs, written in another order than that of their names."""
    path.mkdir()
    for number in reversed(range(len(images))):
        Image.fromarray(images[number]).save(path / f"{number:03d}.png")
    return path


@pytest.mark.slow
def test_every_figure_is_that_of_their_command(tmp_path: Path, inception: Path) -> None:
    rng = np.random.default_rng(0)
    levels = np.linspace(40, 250, 7)[:, None, None, None]  # sets that overlap, so that precision is neither 0 nor 1
    ours = folder_of(tmp_path / "ours", rng.integers(0, levels[rng.integers(0, 5, 7)], (7, 32, 32, 3)).astype(np.uint8))
    theirs = folder_of(tmp_path / "theirs", rng.integers(0, levels, (7, 32, 32, 3)).astype(np.uint8))
    fidelity = Path(sys.executable).parent / "fidelity"
    words = ["--cpu", "-i", "-f", "-k", "-r", "--feature-extractor", "inception-v3-compat", "--json", "--silent"]
    words += ["--feature-extractor-weights-path", str(inception), "--input1", str(ours), "--input2", str(theirs)]
    words += ["-b", "4", "--isc-splits", "3", "--kid-subset-size", "5", "--kid-subsets", "4", "--no-cache"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([str(fidelity), *words], capture_output=True, text=True, env=environment(**threads))
    assert done.returncode == 0, done.stderr
    expected = json.loads(done.stdout)

    out = tmp_path / "out.json"
    settings = ["batch=4", "isc_splits=3", "kid_subset_size=5", "kid_subsets=4", "processes=2"]
    evaluate.command([f"images={ours}", f"reference={theirs}", f"inception={inception}", f"out={out}", *settings])
    found = json.loads(out.read_text())
    assert {key: found["sets"]["images"][name][what][0] for key, (name, what) in NAMES.items()} == {
        key: expected[key] for key in NAMES
    }
    assert 0 < expected["precision"] <= 1
    assert found["protocol"]["extractor"] == "inception-v3-compat"
    assert found["protocol"]["batch"] == 4


def truncated(path: Path, size: int) -> None:
    """A file of so many bytes, which takes no room on the disk."""
    path.touch()
    os.truncate(path, size)


class Runs:
    """What a pickle may do when it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


@pytest.mark.slow
def test_wrong_files_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = {name: torch.zeros(shape) for name, shape in metrics.inception_shapes().items()}
    renamed = {name.replace("Mixed_5b", "Mixed_5x"): value for name, value in whole.items()}
    wrong = {
        "text.pth": (None, "not a PyTorch file of plain tensors"),
        "runs.pth": (Runs(), "not a PyTorch file of plain tensors"),
        "list.pth": ([1, 2], "holds no tensors by name"),
        "renamed.pth": (renamed, r"lacks 'Mixed_5b\."),
        "more.pth": (whole | {"AuxLogits.fc.weight": torch.zeros(1)}, r"has an unknown tensor 'AuxLogits\.fc\.weight'"),
        "shape.pth": (whole | {"fc.weight": torch.zeros(2, 3)}, r"'fc\.weight' is \(2, 3\), not \(1008, 2048\)"),
        "sparse.pth": (whole | {"fc.bias": torch.zeros(1008).to_sparse()}, r"'fc\.bias' is not a dense float32"),
        "whole.pth": (whole | {"fc.bias": torch.zeros(1008).int()}, r"'fc\.bias' is not a dense float32"),
        "meta.pth": (whole | {"fc.bias": torch.zeros(1008, device="meta")}, r"'fc\.bias' is not a dense float32"),
        "vast.pth": ({name: torch.zeros(1).expand(10**12) for name in whole}, r"is \(1000000000000,\), not"),
        "nan.pth": (whole | {"fc.bias": torch.full((1008,), torch.nan)}, r"'fc\.bias' has values that are not finite"),
    }
    for name, (content, message) in wrong.items():
        path = Path(name)
        if content is None:
            path.write_text("hello")
        else:
            torch.save(content, path)
        with pytest.raises(UserError, match=message) as caught:
            metrics.inception(path)
        assert "weights-inception-2015-12-05" in str(caught.value)
        path.unlink()
    assert not Path("executed").exists()
    with pytest.raises(UserError, match="cannot be read"):
        metrics.inception(Path("nowhere.pth"))
    for name, make in {"folder": Path.mkdir, "pipe": os.mkfifo, "huge": lambda path: truncated(path, 2**40)}.items():
        make(Path(name))
        with pytest.raises(UserError, match=r"is a folder|is a pipe|bytes, more than"):
            metrics.inception(Path(name))
    with zipfile.ZipFile("bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(f"archive/data/{number}", bytes(10**8))
    with pytest.raises(UserError, match="not a PyTorch file of plain tensors"):
        metrics.inception(Path("bomb.pth"))
    torch.save({name: value for name, value in whole.items() if "num_batches" not in name}, "old.pth")
    assert metrics.inception(Path("old.pth")).name == "inception-v3-compat"  # as files of old PyTorch are
