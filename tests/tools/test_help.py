"""The help of every tool, the ways to write a setting, and docs/commands.md."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from tests_support import ROOT, environment

from dvae.config.command_line import Command
from dvae.errors import UserError
from dvae.tools import TOOLS
from dvae.utils.class_fields import fields_of, find_class
from dvae.utils.package import VERSION

HELP_OF_ALL = """
import contextlib, importlib, io, json, sys
printed = {}
for name in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            importlib.import_module(f"dvae.tools.{name}").command(["--help"])
        except SystemExit as end:
            printed[name] = [end.code, out.getvalue(), "torch" in sys.modules]
print(json.dumps(printed))
"""
FOLDERS = ("dvae", "launchers", "tools")


def about(name: str) -> Command:
    found: Command = importlib.import_module(f"dvae.tools.{name}").ABOUT
    return found


def printed_by(*words: str) -> str:
    """What a command of Python prints, which ends with status 0."""
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- the help of every tool -------------------------------------------------------------------------------------------


@cache
def help_of_all() -> dict[str, tuple[int, str, bool]]:
    """Exit status, printed help, and whether torch is imported, of each tool. One interpreter, to be quick."""
    found: dict[str, tuple[int, str, bool]] = json.loads(printed_by("-c", HELP_OF_ALL, json.dumps(list(TOOLS))))
    return found


@pytest.mark.parametrize("name", TOOLS)
def test_help_has_the_first_line_and_every_field(name: str) -> None:
    status, text, torch = help_of_all()[name]
    assert status == 0
    assert not torch
    assert about(name).name == name
    assert text.startswith(about(name).text.partition("\n")[0] + "\n")
    for place in about(name).settings:
        module, _, cls = place.partition(":")
        for field in fields_of(find_class(module, cls)):
            assert f"\n  {field.name}=" in text


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_prints_its_help_as_a_script(name: str) -> None:
    assert printed_by(f"tools/{name}.py", "--help") == help_of_all()[name][1]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    for name in TOOLS:
        with pytest.raises(SystemExit) as end:
            importlib.import_module(f"dvae.tools.{name}").command(["--version"])
        assert end.value.code == 0
        assert capsys.readouterr().out == f"dvae {VERSION}\n"


@pytest.mark.parametrize("name", TOOLS)
def test_the_text_begins_with_a_sentence_and_has_examples(name: str) -> None:
    lines = about(name).text.splitlines()
    assert lines[0].endswith(".")
    assert lines[1] == ""
    assert sum(line.startswith(f"  python tools/{name}.py") for line in lines) >= 2
    assert all(len(line) <= 120 for line in lines)


def test_fields_of_type_any_are_listed() -> None:
    names = [field.name for field in fields_of(find_class("dvae.data.building.shards_settings", "ShardsConfig"))]
    assert "source" in names


def test_defaults_are_written_as_on_the_command_line() -> None:
    place = "dvae.inference.image_likelihood", "LikelihoodConfig"
    defaults = {field.name: field.default for field in fields_of(find_class(*place))}
    assert defaults["images"] == "heldout"


# -- the command line -------------------------------------------------------------------------------------------------

DRAW = Command(name="draw", text="Draw.", bare="run", needs_words=True)
SEVERAL = Command(name="do", text="Do.", subcommands=("list", "show"), bare_of={"show": "run"}, flags=("-m",))


@pytest.mark.parametrize(
    ("words", "read"),
    [
        (["n=3", "out=a b"], ["n=3", "out=a b"]),
        (["--n", "3", "--kid-subset-size=4"], ["n=3", "kid_subset_size=4"]),
        (["--strength", "-1"], ["strength=-1"]),
        (["--sampler.steps", "5", "--label="], ["sampler.steps=5", "label="]),
        (["runs/x", "n=3"], ["run=runs/x", "n=3"]),
        (["run"], ["run=run"]),
        (["~classifier", "+x=y", "++x=y", "~x"], ["~classifier", "+x=y", "++x=y", "~x"]),
        (["n=3", ""], ["n=3"]),
    ],
)
def test_ways_to_write_a_setting(words: list[str], read: list[str]) -> None:
    assert DRAW.arguments(words) == read


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["runs/x", "runs/y"], "unknown word 'runs/y'"),
        (["run=runs/x", "runs/y"], "unknown word 'runs/y'"),
        (["--run", "runs/x", "runs/y"], "unknown word 'runs/y'"),
        (["--n"], "--n has no value: write n=VALUE"),
        (["--n", "--seed", "3"], "--n has no value: write n=VALUE"),
        (["--"], "-- has no value"),
        (["-x"], "unknown option '-x'"),
        (["-m"], "unknown option '-m'"),
    ],
)
def test_words_that_mean_nothing(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        DRAW.arguments(words)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_subcommands_and_flags() -> None:
    assert SEVERAL.arguments(["show", "runs/x", "-m"]) == ["show", "run=runs/x", "-m"]
    assert SEVERAL.arguments(["list", "--n", "3"]) == ["list", "n=3"]
    assert SEVERAL.arguments(["n=3"]) == ["n=3"]
    assert SEVERAL.arguments([]) == []
    for words, said in ((["shwo"], "did you mean 'show'"), (["list", "x"], "unknown word 'x'")):
        with pytest.raises(UserError, match=said):
            SEVERAL.arguments(words)


@pytest.mark.parametrize("words", [[], [""], ["-h"], ["n=3", "--help"]])
def test_help_ends_the_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        DRAW.arguments(words)
    assert end.value.code == 0
    assert capsys.readouterr().out == "Draw.\n\nA word without `=` is the value of `run`.\n"


# -- docstrings of settings -------------------------------------------------------------------------------------------


def config_fields() -> Iterator[tuple[str, str, bool]]:
    """File, "Class.field", and whether a docstring follows, of each field of a dataclass named ...Config."""
    for path in (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config") and is_dataclass(node):
                for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                    if isinstance(field, ast.AnnAssign):
                        name = f"{node.name}.{ast.unparse(field.target)}"
                        yield path.relative_to(ROOT).as_posix(), name, is_docstring(after)


def is_dataclass(node: ast.ClassDef) -> bool:
    return any(ast.unparse(one).partition("(")[0] == "dataclass" for one in node.decorator_list)


def is_docstring(node: ast.stmt | None) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def test_every_setting_has_a_docstring() -> None:
    found = list(config_fields())
    assert len(found) > 400
    assert ("dvae/config/schema.py", "RunConfig.seed", True) in found
    without = {(file, name) for file, name, has in found if not has and name != "ComponentConfig.name"}
    assert not without, "these fields have no docstring"


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_of_commands_is_current(tmp_path: Path) -> None:
    made = tmp_path / "commands.md"
    printed_by("docs/generate_commands.py", str(made))
    current = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert made.read_text(encoding="utf-8") == current, "run python docs/generate_commands.py"
    assert all(f"\n## {name}\n" in current for name in TOOLS)
    assert os.fspath(ROOT) not in current
