"""Readers of files that a stranger may have written: what they return, and what they refuse in one line."""

from __future__ import annotations

import io
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.torch import save_file

from dvae.utils import read
from dvae.utils.read import DamagedFile


@read.forbid_extra
@dataclass
class Sample:
    """Stands in for a record."""

    count: int
    values: list[float]
    name: str | None = None


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"count": "1", "values": []}', "count: Input should be a valid integer"),
        ('{"count": true, "values": []}', "count: Input should be a valid integer"),
        ('{"count": 1.5, "values": []}', "count: Input should be a valid integer"),
        ('{"count": 1}', "values: is missing"),
        ('{"count": 1, "values": [], "more": 2}', "more: there is no such field"),
        ('{"count": 1, "count": 1, "values": []}', "the key 'count' is there twice"),
        ('{"count": 1, "values": ["a"]}', "values.0: Input should be a valid number"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"count": ' + "9" * 5000 + "}", "is not valid JSON"),
        ("null", "Input should be an object"),
        ("", "is not valid JSON"),
        ("\ud800", "is not valid JSON"),
    ],
)
def test_json_that_is_not_what_was_asked_for(path: Path, text: str, reason: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DamagedFile) as refused:
        read.read_json(path, Sample)
    assert str(refused.value).startswith(f"{path}: ")
    assert reason in refused.value.reason
    assert "\n" not in str(refused.value)


TEXT = st.text(st.characters(codec="utf-8"))
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@given(JSON_VALUES)
def test_any_json_comes_back_as_it_was(value: Any) -> None:
    assert read.parse_json(json.dumps(value), "x") == value
    assert read.check(Any, value, "x") == value  # type: ignore[arg-type]


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(data)
    refused = []
    for reader in (read.read_yaml, read.read_npy, read.map_npy, read.read_npz, read.read_weights_header):
        try:
            reader(path)
        except DamagedFile as error:
            refused.append(str(error))
    assert len(refused) >= 4  # b"{}" is YAML
    assert not any("\n" in line for line in refused)


@given(JSON_VALUES)
def test_settings_come_back_from_yaml(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "yaml"
    made = OmegaConf.create({"a": {"b": 1e-4, "c": [True, None, "1e-4"]}, "n": len(str(value))})
    path.write_text(OmegaConf.to_yaml(made), encoding="utf-8")
    assert read.read_yaml(path) == OmegaConf.to_container(made)


def test_interpolations_in_yaml_stay_text(path: Path) -> None:
    path.write_text("a: ${oc.env:HOME}\nb: ${a}\n")
    assert read.read_yaml(path) == {"a": "${oc.env:HOME}", "b": "${a}"}


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda p: os.mkfifo(p), "is a pipe, not a file"),
        (lambda p: p.symlink_to("/dev/zero"), "is a device, not a file"),
        (lambda p: p.mkdir(), "is a folder, not a file"),
        (lambda p: p.write_bytes(bytes(100)), "has 100 bytes, more than the 99"),
    ],
)  # fmt: skip
def test_what_is_no_file_or_too_large_is_not_opened(path: Path, make: Any, kind: str) -> None:
    make(path)
    with pytest.raises(DamagedFile, match=kind):
        read.read_bytes(path, 99)


def test_arrays_come_back_and_headers_that_lie_are_refused(path: Path) -> None:
    whole = np.arange(24, dtype=np.int64).reshape(2, 3, 4)
    for array in (whole, np.asfortranarray(whole), whole[:0], np.float32(3.5), np.array([True])):
        with path.open("wb") as file:
            np.save(file, array)
        assert np.array_equal(read.read_npy(path), array)
        assert np.array_equal(read.map_npy(path), array)
    buffer = io.BytesIO()
    np.save(buffer, whole)
    data = buffer.getvalue()
    lies = [(b"(2, 3, 4)", b"(-2,3, 4)"), (b"(2, 3, 4)", b"(2, 3, 5)"), (b"'<i8'", b"'|O8'"), (b"'<i8'", b"'<M8'")]
    lies += [(b"'<i8'", b"'<U9'"), (b"False", b"Fals "), (b"descr", b"descx"), (b"\x93NUMPY", b"\x93NUMPX")]
    for old, new in lies:
        assert old in data
        path.write_bytes(data.replace(old, new))
        for reader in (read.read_npy, read.map_npy):
            with pytest.raises(DamagedFile):
                reader(path)


def test_an_archive_of_arrays_has_a_bound(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.ones(3), b=np.arange(4))
    assert set(read.read_npz(path)) == {"a", "b"}
    with pytest.raises(DamagedFile, match="more than 40 bytes"):
        read.read_npz(path, 40)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", b"no array")
    with pytest.raises(DamagedFile, match=r"file:a: is not a \.npy array"):
        read.read_npz(path)


def test_the_header_of_weights_tells_names_types_and_shapes(path: Path) -> None:
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(1)}, path, {"x": "y"})
    found = read.read_weights_header(path)
    assert {name: (one.dtype, one.shape) for name, one in found.items()} == {
        "a": ("F32", (2, 3)), "b": ("BF16", (4,)), "c": ("I64", ()),
    }  # fmt: skip
    assert read.read_weights_metadata(path) == {"x": "y"}


def test_weights_with_bytes_that_belong_to_no_tensor_are_refused(path: Path) -> None:
    save_file({"a": torch.zeros(2)}, path)
    assert read.read_weights_header(path)["a"].shape == (2,)
    os.truncate(path, 2**40)  # sparse: it takes no room on the disk, and hours to hash
    with pytest.raises(DamagedFile, match="bytes that belong to no tensor"):
        read.read_weights_header(path)
