"""Command lines of the tools: the help text, and the notations in which a setting can be written.

The help text comes from the docstrings of the settings. This module does not import torch, so help appears at once.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NoReturn

from dvae.errors import UserError, suggest
from dvae.utils.class_fields import REQUIRED, FieldText, fields_of, find_class
from dvae.utils.package import VERSION

COLUMN = 30
"""Width of the left column of a table of settings, in characters."""
WIDEST = 120
"""Largest width of a table, in characters."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """The description of a tool, and the rules by which its arguments are read."""

    name: str
    """The tool's name: tools/NAME.py, or `dvae NAME`."""
    text: str
    """The help text, with examples. Its first line is a complete sentence."""
    settings: tuple[str, ...] = ()
    """Classes whose fields are its settings, such as "dvae.training.export:ExportConfig"."""
    subcommands: tuple[str, ...] = ()
    """The words that may come first, one of them at a time."""
    bare: str = ""
    """The setting to which a word without `=` is assigned, such as "run". Empty if there is none."""
    bare_of: dict[str, str] = field(default_factory=dict)
    """The setting `bare` after each subcommand, if it differs: subcommand -> setting."""
    needs_words: bool = False
    """Whether the tool needs arguments. Without any, it prints its help."""
    flags: tuple[str, ...] = ()
    """Options with leading dashes that the tool reads itself."""

    def arguments(self, argv: list[str]) -> list[str]:
        """Return the arguments as `key=value` words, and the flags.

        `--key value` and `--key=value` become `key=value`, and a word without a key becomes the setting `bare`. If
        `argv` contains -h, --help or --version, this prints the text and ends the program. The help is also printed if
        `needs_words` is set and there are no words. Raises UserError for an unknown word.
        """
        argv = [word for word in argv if word]  # an unset variable of a shell script leaves an empty word
        if any(word in ("-h", "--help") for word in argv) or (self.needs_words and not argv):
            self.end(self.help())
        if "--version" in argv:
            self.end(f"dvae {VERSION}")
        first, bare = [], self.bare
        if self.subcommands and argv and "=" not in argv[0] and not argv[0].startswith("-"):
            if argv[0] not in self.subcommands:
                raise UserError(f"unknown word {argv[0]!r}: {suggest(argv[0], self.subcommands)}")
            first, bare = argv[:1], self.bare_of.get(argv[0], self.bare)
        return first + list(self._words(argv[len(first) :], bare))

    def _words(self, argv: list[str], bare: str) -> Iterator[str]:
        left = list(argv)
        given = any(one == f"--{bare}" or one.removeprefix("--").startswith(f"{bare}=") for one in argv)
        while left:
            word = left.pop(0)
            if word in self.flags:
                yield word
            elif word.startswith("--"):
                key, equals, value = word[2:].partition("=")
                if not equals and (not left or left[0].startswith("--")):
                    raise UserError(f"{word} has no value: write {key or 'key'}=VALUE")
                yield f"{key.replace('-', '_')}={value if equals else left.pop(0)}"
            elif "=" in word or word.startswith(("~", "+")):
                yield word
            elif bare and not word.startswith("-") and not given:
                yield f"{bare}={word}"
                bare = ""  # only one word can be the setting `bare`
            else:
                self._refuse(word)

    def _refuse(self, word: str) -> NoReturn:
        known = f"; the first word is one of {', '.join(self.subcommands)}" if self.subcommands else ""
        what = "option" if word.startswith("-") else "word"
        raise UserError(f"unknown {what} {word!r}: settings are written key=value{known}; `--help` lists them")

    def end(self, text: str) -> NoReturn:
        """Print a text, and end the program with exit status 0."""
        print(text)
        raise SystemExit(0)

    @property
    def bare_note(self) -> str:
        """A sentence that names the setting to which a word without `=` is assigned. Empty if there is none."""
        settings = [f"`{self.bare}`"] if self.bare else []
        for key in dict.fromkeys(self.bare_of.values()):
            words = [f"`{word}`" for word in self.bare_of if self.bare_of[word] == key]
            settings.append(f"`{key}` after {' or '.join(words)}")
        return f"A word without `=` is the value of {', of '.join(settings)}." if settings else ""

    def help(self) -> str:
        """Return the help text, followed by a table of the settings for each class in `settings`."""
        parts = [self.text.strip(), *filter(None, [self.bare_note])]
        for place in self.settings:
            module, _, name = place.partition(":")
            heading = "Settings" if len(self.settings) == 1 else find_class(module, name).summary.rstrip(".")
            parts.append(f"{heading}:\n{settings_table(fields_of(find_class(module, name)))}")
        return "\n\n".join(parts)


def settings_table(fields: Iterable[FieldText]) -> str:
    """Return a table with one row per setting: name and default, then meaning and type."""
    return "\n".join(f"  {row}" for field in fields for row in _rows(field))


def _rows(field: FieldText) -> Iterator[str]:
    default = "..." if field.default == REQUIRED else field.default
    meaning = f"{field.meaning} ({field.type})" if field.meaning else f"({field.type})"
    yield from table_rows(f"{field.name}={default}", meaning)


def table_rows(left: str, right: str) -> Iterator[str]:
    """Yield the lines of a row with two columns. The right column is wrapped at the width of the terminal."""
    width = min(WIDEST, shutil.get_terminal_size((100, 24)).columns) - COLUMN - 3
    lines = textwrap.wrap(right, max(width, 30)) or [""]
    if len(left) >= COLUMN:
        yield left
    else:
        yield f"{left:<{COLUMN}}{lines.pop(0)}"
    yield from (" " * COLUMN + line for line in lines)
