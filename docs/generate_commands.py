"""Write docs/commands.md from the help of every tool: python docs/generate_commands.py [FILE]"""

from __future__ import annotations

import importlib
import itertools
import operator
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from dvae.config.command_line import Command
from dvae.config.launch_help import run_fields, training_fields
from dvae.tools import TOOLS
from dvae.utils.class_fields import REQUIRED, FieldText, fields_of, find_class

PAGE = Path(__file__).with_name("commands.md")
INTRODUCTION = """# Commands

This page is generated from the help of the tools (`python docs/generate_commands.py`). Do not edit it by hand.

`python tools/NAME.py --help` prints the same text. If dvae was installed with pip, `dvae NAME` is the same command.

- A setting is written `key=value`, `--key=value` or `--key value`.
- Most tools take a path without a key, too: `python tools/sample.py runs/demo` is `run=runs/demo`.
- Lists are written `[a,b]`, `null` is no value, `true` and `false` are yes and no.
- `-h` or `--help` prints the help, `--version` prints the version.
- A setting whose default is *required* must be given.
"""
LAUNCH_NOTE = """
The stages add settings of their own, and each component has its own settings, which are written `KIND.FIELD=VALUE`.
`python tools/launch.py --help` lists stages, components, presets and recipes.
`python tools/components.py KIND NAME` shows the settings of one component."""


def page() -> str:
    """The page as Markdown: a table of contents, then a section for each tool."""
    commands = {name: importlib.import_module(f"dvae.tools.{name}").ABOUT for name in TOOLS}
    contents = [f"- [{name}](#{name}): {first_line(about)}" for name, about in commands.items()]
    return "\n".join([INTRODUCTION, *contents, *(line for about in commands.values() for line in section(about)), ""])


def first_line(about: Command) -> str:
    return about.text.strip().partition("\n")[0]


def section(about: Command) -> Iterator[str]:
    """The text of a tool, and the tables of its settings."""
    yield from ("", f"## {about.name}", "", *markdown_text(about.text))
    if about.bare_note:
        yield from ("", about.bare_note)
    for place in about.settings:
        module, _, name = place.partition(":")
        source = find_class(module, name)
        heading = "Settings" if len(about.settings) == 1 else source.summary.rstrip(".")
        yield from ("", f"**{heading}**", "", *table(fields_of(source)))
    if about.name == "launch":
        yield from launch_settings()


def launch_settings() -> Iterator[str]:
    """The settings of a run, and of a stage that trains."""
    yield from ("", "**Settings of a run**", "", *table(run_fields()))
    yield from ("", "**Settings of each stage that trains, such as train_refiner.steps=20000**", "")
    yield from table(training_fields())
    yield from LAUNCH_NOTE.splitlines()


def table(fields: list[FieldText]) -> Iterator[str]:
    """A row for each setting: name, default, type, meaning."""
    yield "| setting | default | type | meaning |"
    yield "|---|---|---|---|"
    for field in fields:
        default = "*required*" if field.default == REQUIRED else code(field.default)
        yield f"| `{field.name}` | {default} | {code(field.type)} | {escaped(field.meaning)} |"


def code(text: str) -> str:
    """Code in a cell of a table, where | would end the cell."""
    return "`" + text.replace("|", "\\|") + "`"


def escaped(text: str) -> str:
    """Text in a cell: signs that Markdown reads are escaped, but for code in backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part.replace("|", "\\|") if part.startswith("`") else plain(part) for part in parts)


def plain(text: str) -> str:
    return re.sub(r"([\\*<|])", r"\\\1", text)


def markdown_text(text: str) -> Iterator[str]:
    """The text of a tool as Markdown. Indented lines become blocks of code, unless they continue an item of a list."""
    kinds, kind = [], "text"
    lines = text.strip().splitlines()
    for line in lines:
        if line.startswith("  "):
            kind = kind if kind == "list" else "code"
        else:
            kind = "list" if line.startswith("- ") else "text"
        kinds.append(kind)
    for kind, group in itertools.groupby(zip(kinds, lines, strict=True), key=operator.itemgetter(0)):
        rows = [line for _, line in group]
        yield from ("```", *(row.removeprefix("  ") for row in rows), "```") if kind == "code" else rows


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    out.write_text(page(), encoding="utf-8")
    print(out)
