"""YAML files that a user wrote: what they may hold is read as before, every mistake is one line with a place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from tests_support import ROOT

from dvae.utils.read import DamagedFile
from dvae.utils.user_yaml import read_user_yaml

FINE = """
text: plain
reference: ${oc.env:HOME}
numbers: [1, 2.5, 1e-3, 0x10, .inf, null, true]
base: &base {lr: 1.0e-3, steps: 5}
again: {<<: *base, steps: 7}
twice: [*base, *base]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("s[tw]*/*.yaml")), ids=lambda path: path.stem)
def test_the_files_that_are_shipped_are_read_as_before(path: Path) -> None:
    assert read_user_yaml(path) == OmegaConf.to_container(OmegaConf.load(path))
    assert read_user_yaml(path, "yaml") == yaml.safe_load(path.read_text())


def test_aliases_merge_keys_and_numbers_are_read_as_before(tmp_path: Path) -> None:
    path = written(tmp_path, FINE)
    assert read_user_yaml(path) == OmegaConf.to_container(OmegaConf.load(path))
    assert read_user_yaml(path)["numbers"][2] == 0.001
    found = read_user_yaml(path, "yaml")
    assert found == yaml.safe_load(FINE)
    assert found["numbers"][2] == "1e-3"
    assert found["again"] == {"lr": 0.001, "steps": 7}


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 500))
MERGES = "a0: &a0 {k0: 1, k1: 2}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 30)
)


@pytest.mark.parametrize("dialect", ["omegaconf", "yaml"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not a mapping"), ("- a\n", "is not a mapping"), ("text", "is not a mapping"),
        ("a: [1,\n", "is not valid YAML"), ("a: b: c", "is not valid YAML"), ("a: *nothing", "is not valid YAML"),
        ("a: 1\n---\nb: 2\n", "is not valid YAML"), ("\x00", "is not valid YAML"), ("\tx: 1", "is not valid YAML"),
        ("a: 1\nb: 2\na: 3\n", "the key 'a' is there twice, line 3"),
        ("x:\n  - {b: 1, b: 1}\n", "the key 'b' is there twice, line 2"),
        ("a: !!python/object/apply:os.system [true]", "is not valid YAML"),
        ("a: !!python/name:os.system", "is not valid YAML"),
        ("1: a", "it has the key 1: write keys as text"), ("a: {true: b}", "a has the key True"),
        ("a: {? [1] : b}", "is not valid YAML"),
        ("a: !!set {b, c}", "a is {"), ("a: [!!binary eA==]", "a[0] is b'x', not text or a number"),
        ("a: &a [*a]", "an alias stands for itself, line 1"), (LAUGHS, "holds more than 200000 values"),
        (MERGES, "holds more than 200000 values"), (CHAIN, "is nested too deeply"),
        ("a: " + "[" * 100_000, "nesting depth"), ("{a: " * 5000, "is nested too deeply, line 1"),
        ("a: " + "9" * 10_000, "is not valid YAML"), ("#" * 2**23, "bytes, more than"),
    ],
    ids=range(26),
)  # fmt: skip
def test_a_mistake_is_one_line(tmp_path: Path, text: str, reason: str, dialect: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(DamagedFile) as error:
        read_user_yaml(path, dialect)
    assert str(error.value).startswith(f"{path}: ")
    assert reason in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_date_is_none(tmp_path: Path) -> None:
    path = written(tmp_path, "a: 2020-01-01\n")
    with pytest.raises(
        DamagedFile, match=r"a is datetime\.date\(2020, 1, 1\), not text or a number: write it in quotes"
    ):
        read_user_yaml(path, "yaml")
    assert read_user_yaml(path) == {"a": "2020-01-01"}


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.write_bytes(b"a: \xff")])
def test_what_is_no_text_file_is_told(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "mine.yaml")
    with pytest.raises(DamagedFile, match=r"not a file|is not UTF-8 text"):
        read_user_yaml(tmp_path / "mine.yaml")
