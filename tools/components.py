"""List what is registered: python tools/components.py [kind] [plugins=[module]]"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from dvae.config.schema import TrainingConfig
from dvae.errors import UserError, printable_line, run_command, suggest
from dvae.registry.core import Registry, broken_plugins_note
from dvae.registry.discovery import discover, load_plugins, origin, registries

USAGE = "usage: python tools/components.py [{kinds}] [plugins=[module]]"


def command(argv: list[str]) -> None:
    """Print every component of one kind, or of all: name, summary, package, fields with their defaults."""
    discover()
    known = registries()
    kinds = [word for word in argv if "=" not in word and not word.startswith("-")]
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE.format(kinds="|".join(known)))
        return
    for word in argv:
        if word.startswith("plugins="):
            names = word.removeprefix("plugins=").strip("[]").split(",")
            load_plugins([name.strip() for name in names if name.strip()])
        elif "=" in word or word.startswith("-"):
            raise UserError(f"unknown word {word!r}: {USAGE.format(kinds='|'.join(known))}")
    for kind in kinds or known:
        if kind not in known:
            raise UserError(f"unknown kind {kind!r}: {suggest(kind, known)}")
        print_kind(known[kind])
    if broken_plugins_note():
        print(broken_plugins_note().removeprefix("; "))


def print_kind(registry: Registry[Any]) -> None:
    print(f"{registry.kind}:")
    for name in registry.names():
        cls = registry.get(name)
        summary = printable_line((inspect.getdoc(cls) or "").partition("\n")[0])
        print(f"  {name:<14} {summary}  [{' '.join(origin(cls))}]")
        prefix = f"{registry.kind}." if registry.chosen else ""  # fields of a stage stand beside those of a run
        for name, value in _defaults(cls.Config):
            print(f"    {prefix}{name}={value}")


def _defaults(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The fields of a dataclass with their defaults; those of a training are told by their common type."""
    for field in fields(config):
        value: Any = field.default if field.default is not MISSING else field.default_factory()  # type: ignore[operator]
        if isinstance(value, TrainingConfig):
            yield f"{field.name}.steps", "...  (and all else that train_refiner has)"
        elif is_dataclass(value):
            yield from _defaults(value, f"{prefix}{field.name}.")
        elif field.name != "name":
            yield f"{prefix}{field.name}", printable_line(getattr(value, "name", value))


if __name__ == "__main__":
    run_command(command)
