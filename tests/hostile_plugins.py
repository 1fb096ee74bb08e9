"""Plug-ins that are broken in every way that we could think of, for tests that load all of them."""

from __future__ import annotations

from textwrap import indent
from typing import NamedTuple


class HostilePlugin(NamedTuple):
    """A plug-in of one module."""

    name: str
    source: str
    """Text of its file."""
    message: str | None
    """What the error line must contain; None if the plug-in works."""


HEADER = """
import os, sys, warnings
from dataclasses import dataclass, field
import torch
from hydra.core.config_store import ConfigStore
from dvae.errors import MachineError, UserError
from dvae.registry.core import KINDS, ComponentConfig, Registry, Shapes
from dvae.registry.launchers.base import LAUNCHERS
from dvae.registry.refiners.base import REFINERS
from dvae.registry.schedules.base import SCHEDULES, Schedule

METHODS = {name: lambda self, t: t for name in ("integral", "rate", "inverse", "__init__")}
Plain = type("Plain", (Schedule,), METHODS)
"""
FIELDS = "rate: float = 1.0"


def schedule(
    fields: str = FIELDS,
    *,
    name: str = "'hostile'",
    base: str = "Plain",
    config: str = "ComponentConfig",
    decorator: str = "@dataclass(kw_only=True, slots=True)",
    doc: str = "A schedule.",
) -> str:
    """The source of a schedule, which is fine unless one of the words makes it otherwise."""
    return (
        f"\n@SCHEDULES.register({name})\nclass Hostile({base}):\n    {doc!r}\n"
        f"    {decorator}\n    class Config({config}):\n{indent(fields, ' ' * 8)}\n"
    )


def plugin(name: str, source: str, message: str | None) -> HostilePlugin:
    return HostilePlugin(name, HEADER + source, message)


GOOD = schedule()
INHERITS = "\n@SCHEDULES.register('hostile')\nclass Hostile(SCHEDULES.get('linear')): ..."


def hostile_plugins() -> list[HostilePlugin]:
    """All of them; each has another name, which is a module's."""
    return [*_imports(), *_errors(), *_configs(), *_classes(), *_names(), *_thieves()]


def _imports() -> list[HostilePlugin]:
    """What an import does besides, and how it ends."""
    return [
        plugin("fine", GOOD, None),
        plugin("prints", "print('hello')\nprint('careful', file=sys.stderr)" + GOOD, None),
        plugin("prints_and_fails", "print('hello\\n' * 20)\nraise ValueError('no luck')", "ValueError: no luck"),
        plugin("closes_stdout", "sys.stdout.close()\nsys.stderr.close()" + GOOD, None),
        plugin("takes_stdout_away", "sys.stdout = sys.stderr = None" + GOOD, None),
        plugin("warns", "warnings.warn('old')" + GOOD, None),
        plugin("exits", GOOD + "\nsys.exit()", "SystemExit"),
        plugin("exits_with_text", "sys.exit('good\\nbye')", "SystemExit: good bye"),
        plugin("exits_with_zero", GOOD + "\nraise SystemExit(0)", "SystemExit: 0"),
        HostilePlugin("is_no_python", "def (:\n", "SyntaxError"),
        HostilePlugin("holds_a_zero_byte", "x = 1\0\n", "null bytes"),
        HostilePlugin("is_wrongly_indented", "if True:\nx = 1\n", "IndentationError"),
        plugin("imports_what_is_not_there", "import a_module_that_is_not_there", "No module named"),
        plugin("imports_what_dvae_has_not", "from dvae.registry import NOTHING", "ImportError"),
        plugin("leaves_sys_modules", GOOD + "\ndel sys.modules[__name__]", "KeyError"),
        plugin("fails_after_registering", GOOD + "\nraise RuntimeError('half way')", "RuntimeError: half way"),
        plugin("asserts", GOOD + "\nassert False", "AssertionError"),
        plugin("recurses", "def again(): again()\nagain()", "RecursionError"),
        plugin("wants_all_memory", "bytes(2**62)", "MemoryError"),
    ]


def _errors() -> list[HostilePlugin]:
    """What is raised."""
    unreadable = "message cannot be read"
    return [
        plugin("raises_no_text", "raise ValueError({1: [2]})", "ValueError: {1: [2]}"),
        plugin("raises_nothing_at_all", "raise ValueError", "ValueError"),
        plugin("raises_text", "raise 'no class'", "exceptions must derive from BaseException"),
        plugin("raises_lines", "raise ValueError('one\\ntwo\\r\\nthree')", "ValueError: one two three"),
        plugin("raises_control_characters", "raise ValueError('\\x1b[31mred\\x00')", r"\x1b[31mred\x00"),
        plugin("raises_half_a_character", "raise ValueError('\\ud800')", "ValueError"),
        plugin("raises_much", "raise ValueError('x' * 10**7)", "ValueError: xxx"),
        plugin("raises_a_user_error", "raise UserError('mine')", "UserError: mine"),
        plugin("raises_a_machine_error", "raise MachineError('mine')", "MachineError: mine"),
        plugin("raises_another_base", "class Odd(BaseException): pass\nraise Odd('odd')", "Odd: odd"),
        plugin("raises_an_os_error", "open('/there/is/no/such/file')", "FileNotFoundError"),
        plugin("str_raises", _error("raise RuntimeError"), unreadable),
        plugin("str_exits", _error("sys.exit(3)"), unreadable),
        plugin("str_interrupts", _error("raise KeyboardInterrupt"), unreadable),
        plugin("str_is_a_number", _error("return 3"), unreadable),
    ]


def _error(body: str) -> str:
    return f"class Odd(Exception):\n    def __str__(self): {body}\nraise Odd"


def _configs() -> list[HostilePlugin]:
    """A Config that is none."""
    wanted = "needs a nested @dataclass(kw_only=True, slots=True) class Config(ComponentConfig)"
    built = "cannot be built from its defaults"
    return [
        plugin("field_without_default", schedule("rate: float"), "Config.rate has no default: give it one"),
        plugin("default_of_another_type", schedule("rate: int = 'fast'"), built),
        plugin("mutable_default", schedule("rates: list[float] = []"), "mutable default"),
        plugin("field_of_an_unknown_type", schedule("rate: torch.Tensor = None"), built),
        plugin("field_of_no_type", schedule("rate: 'nothing.like.this' = 1"), built),
        plugin("name_is_a_number", schedule("name: int = 3"), built),
        plugin("post_init_raises", schedule("def __post_init__(self): raise OSError('no')"), built),
        plugin("factory_raises", schedule("rate: float = field(default_factory=lambda: 1 / 0)"), "ZeroDivisionError"),
        plugin("config_is_not_kw_only", schedule(decorator="@dataclass(slots=True)"), wanted),
        plugin("config_has_no_slots", schedule(decorator="@dataclass(kw_only=True)"), wanted),
        plugin("config_is_no_dataclass", schedule("pass", decorator=""), wanted),
        plugin("config_has_another_base", schedule(config="object"), wanted),
        plugin("no_config", "\n@SCHEDULES.register('hostile')\nclass Hostile(Plain): ...", wanted),
        plugin("config_is_inherited", INHERITS, wanted),
        plugin("config_is_text", "\n@SCHEDULES.register('hostile')\nclass Hostile(Plain): Config = 'none'", wanted),
        plugin("launcher_without_its_base", _launcher(), "class Config(LauncherConfig)"),
    ]


def _launcher() -> str:
    return (
        "from dvae.registry.launchers.base import Launcher\n"
        + schedule(base="Launcher").replace("SCHEDULES", "LAUNCHERS")
        + "    ranks = 1\n    def launch(self, folder): ...\n"
    )


def _classes() -> list[HostilePlugin]:
    """A class that is no component."""
    return [
        plugin("another_base", schedule(base="torch.nn.Module"), "derives from dvae.registry.schedules.base.Schedule"),
        plugin("another_kind", GOOD.replace("SCHEDULES", "REFINERS"),
               "derives from dvae.registry.refiners.base.Refiner"),
        plugin("base_by_assertion", "Schedule.register(torch.nn.Module)" + schedule(base="torch.nn.Module"),
               "derives from dvae.registry.schedules.base.Schedule"),
        plugin("abstract", schedule(base="Schedule"), "must implement __init__, integral, inverse, rate"),
        plugin("a_function", "\n@SCHEDULES.register('hostile')\ndef hostile(): ...", "must be a class"),
        plugin("a_number", "SCHEDULES.register('hostile')(3)", "must be a class"),
        plugin("second_is_bad", GOOD + schedule("rate: float", name="'other'"), "Config.rate has no default"),
        plugin("odd_summary", schedule(doc="\x1b[31mred\nand more"), None),
    ]  # fmt: skip


def _names() -> list[HostilePlugin]:
    """A name that is none, or somebody else's."""
    wrong = "a name has lower-case letters, digits and underscores only"
    return [
        plugin("name_with_capitals", schedule(name="'Mine'"), wrong),
        plugin("name_with_a_path", schedule(name="'../mine'"), wrong),
        plugin("name_with_a_line", schedule(name="'mine\\n'"), wrong),
        plugin("name_with_an_accent", schedule(name="'é'"), wrong),
        plugin("empty_name", schedule(name="''"), wrong),
        plugin("name_is_none", schedule(name="None"), "a name is text"),
        plugin("name_is_a_class", schedule(name="Schedule"), "register takes a name"),
        plugin("name_of_dvae", schedule(name="'linear'"), "'linear' of name_of_dvae is registered already, by dvae"),
        plugin("name_twice", GOOD + GOOD, "'hostile' of name_twice is registered already, by name_twice"),
    ]


def _thieves() -> list[HostilePlugin]:
    """Plug-ins that take away what others brought."""
    schedule_gone = "replaces or removes the schedule 'linear'"
    return [
        plugin("replaces_a_component", "SCHEDULES._classes['linear'] = Plain", schedule_gone),
        plugin("removes_a_component", "del SCHEDULES._classes['linear']", schedule_gone),
        plugin("removes_all_components", "SCHEDULES._classes.clear()", "replaces or removes the schedule"),
        plugin("removes_the_table", "SCHEDULES._classes = None", "AttributeError"),
        plugin("enters_past_register", "SCHEDULES._classes['odd'] = object", "derives from"),
        plugin("replaces_a_config", "ConfigStore.instance().store(group='schedule', name='linear', node={'end': 1.0})",
               "replaces or removes the config 'schedule/linear'"),
        plugin("removes_all_configs", "ConfigStore.instance().repo.clear()", "replaces or removes the config"),
        plugin("replaces_a_registry", "Registry('schedule', 'dvae', Plain)", "the registry of the kind 'schedule'"),
        plugin("adds_a_registry", "Registry('mine', 'dvae', Plain)", "the registry of the kind 'mine'"),
        plugin("removes_a_registry", "del KINDS['schedule']", "the registry of the kind 'schedule'"),
        plugin("replaces_and_fails", "KINDS.clear()\nSCHEDULES._classes.clear()\nsys.exit(1)", "SystemExit: 1"),
    ]  # fmt: skip
