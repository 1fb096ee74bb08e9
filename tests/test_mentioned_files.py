"""Files that documents, comments and messages mention exist, so that a reader who follows them arrives."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tests_support import ROOT

FOLDERS = ("dvae", "launchers", "recipes", "tools", "tests", "docs")
MENTION = re.compile(r"(?<![\w./-])(?:[\w-]+/)*[\w-]+\.(?:py|md|jinja|sh)\b")
EXAMPLES = {"my_schedule.py", "my_stage.py", "changelog.md", "contributing.md", "out/study.md", "tools/judge.py"}
"""Files that a reader or a command writes, pages of the site, and files of the past in CHANGELOG.md."""


def files() -> Iterator[Path]:
    """Texts of the project. Golden values and hostile data hold names of their own."""
    yield from (ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "setup.py"))
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".yaml", ".sh", ".jinja") and "__pycache__" not in path.parts:
                yield path


def mentioned(text: str) -> set[str]:
    """Names of files in a text; NAME.py and the like stand for any."""
    return {
        name for name in MENTION.findall(text) if not re.search(r"[A-Z]", name.rpartition("/")[2].rpartition(".")[0])
    }


def test_mentioned_files_exist() -> None:
    known = {f"/{path.relative_to(ROOT).as_posix()}" for path in files()} | {"/README.md", "/CONTRIBUTING.md"}
    assert "/tests/test_mentioned_files.py" in known
    wrong = {}
    for path in files():
        if path.parts[len(ROOT.parts)] == "tests":
            continue  # tests write files of their own
        lost = {name for name in mentioned(path.read_text(encoding="utf-8"))
                if name not in EXAMPLES and not any(one.endswith(f"/{name}") for one in known)}  # fmt: skip
        if lost:
            wrong[path.relative_to(ROOT).as_posix()] = sorted(lost)
    assert not wrong, "\n".join(f"{name}: {lost}" for name, lost in wrong.items())
