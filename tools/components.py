"""List components and their settings: python tools/components.py [KIND [NAME]] [plugins=[module]]"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from dvae.config.command_line import Command, settings_table, table_rows
from dvae.errors import UserError, printable_line, run_command, suggest

ABOUT = Command(
    name="components",
    text="""List what can be chosen: components of every kind, and stages.

  python tools/components.py                    # every kind, every name, in a line each
  python tools/components.py schedule           # the schedules
  python tools/components.py refiner unet       # the fields of one: default, type, meaning
  python tools/components.py stage my_stage plugins=[my_module]

The fields of a component are set as KIND.FIELD=VALUE, those of a stage by their own names.""",
)


def command(argv: list[str]) -> None:
    """Print the components of one kind or of all, or the fields of one component."""
    names, settings = [word for word in argv if is_name(word)], [word for word in argv if not is_name(word)]
    settings = ABOUT.arguments(settings)
    from dvae.config.compose import plugins_of
    from dvae.registry.core import broken_plugins_note
    from dvae.registry.discovery import discover, load_plugins, registries

    if wrong := [word for word in settings if not word.startswith("plugins=")]:
        raise UserError(f"unknown word {wrong[0]!r}: give a kind, a name and plugins=[MODULE]")
    discover()
    load_plugins(plugins_of(settings))
    known = registries()
    if names and names[0] not in known:
        raise UserError(f"unknown kind {names[0]!r}: {suggest(names[0], known)}")
    if len(names) > 2:
        raise UserError(f"unknown word {names[2]!r}: give one kind and one name")
    if len(names) == 2:
        print("\n".join(described(known[names[0]], names[1])))
    else:
        print("\n".join(line for kind in names or known for line in listed(known[kind])))
    if broken_plugins_note():
        print(broken_plugins_note().removeprefix("; "))


def is_name(word: str) -> bool:
    return "=" not in word and not word.startswith("-")


def listed(registry: Any) -> Iterator[str]:
    """The components of one kind, a line each: name, summary, package."""
    yield f"{registry.kind}:"
    for name in registry.names():
        yield from (f"  {row}" for row in table_rows(name, summary(registry.get(name))))


def summary(cls: type) -> str:
    from dvae.registry.discovery import origin

    line = printable_line((inspect.getdoc(cls) or "").partition("\n")[0])
    return f"{line}  [{' '.join(origin(cls))}]"


def described(registry: Any, name: str) -> Iterator[str]:
    """One component: its docstring and its fields."""
    from dvae.utils.class_fields import fields_of, find_class

    cls = registry.get(name)
    yield f"{registry.kind} {name}: {summary(cls)}"
    if rest := (inspect.getdoc(cls) or "").partition("\n")[2].strip():
        yield printable_line(rest)
    prefix = f"{registry.kind}." if registry.chosen else ""  # fields of a stage stand beside those of a run
    fields = fields_of(find_class(cls.__module__, cls.Config.__qualname__), prefix)
    yield settings_table(fields) or "  It has no fields."


if __name__ == "__main__":
    run_command(command)
