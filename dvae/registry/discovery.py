"""Discovery: import the components that dvae brings, and plug-ins, installed or named in `plugins=[...]`."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dvae.errors import UserError, printable_line
from dvae.registry import plugins
from dvae.registry.core import BEFORE_LOOKUP, BROKEN_PLUGINS, KINDS, Registry
from dvae.utils.package import FOLDER, VERSION

ENTRY_POINT_GROUP = "dvae.plugins"
RECIPE_FOLDERS: list[Path] = []
"""The folders recipes/ of the plug-ins that were imported: each is laid out as the folder recipes/ of dvae."""
_imported_installed = False


def registries() -> dict[str, Registry[Any]]:
    """The registry of every kind, by kind, in alphabetical order."""
    _import_kinds()
    return dict(sorted(KINDS.items()))


def chosen_kinds() -> dict[str, Registry[Any]]:
    """The registries of the kinds of which a run's settings choose one component: all but the stages."""
    return {kind: registry for kind, registry in registries().items() if registry.chosen}


@functools.cache
def _import_kinds() -> None:
    """Import the base class of every kind, which enters its registry in KINDS; no component is imported."""
    for folder in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if folder.ispkg:
            importlib.import_module(f"{__package__}.{folder.name}.base")


def discover() -> None:
    """Import every component that dvae brings, then every installed plug-in (entry points `dvae.plugins`), once."""
    _import_builtins()
    import_installed_plugins()


def _import_builtins() -> None:
    for registry in registries().values():
        registry.import_builtins()


def import_installed_plugins() -> None:
    """Import every installed plug-in, once. What dvae brings is imported first if there is one, because a plug-in may
    not take a name that exists.

    A plug-in that cannot be imported leaves nothing behind. It is remembered, and named if a component is not found.
    """
    global _imported_installed
    if _imported_installed:
        return
    _imported_installed = True  # first, because a plug-in may ask a registry while it is imported
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        _import_builtins()
        try:
            module = entry.value.partition(":")[0].strip()
            with plugins.all_or_nothing(module, KINDS):
                entry.load()
                _enter_recipes(module)
        except plugins.PluginError as error:
            BROKEN_PLUGINS[printable_line(f"{entry.name} ({entry.value})")] = str(error)


BEFORE_LOOKUP.append(import_installed_plugins)


def load_plugins(modules: Iterable[str]) -> None:
    """Import the modules of `plugins=[...]`, which register components. Raises UserError if one cannot be imported.

    What dvae brings is imported first if there is a module, because a plug-in may not take a name that exists. Modules
    are looked for in the working folder too, after all other places.
    """
    import_installed_plugins()
    if isinstance(modules, Mapping) or not isinstance(modules, Iterable):
        raise UserError(f"plugins={modules!r}: give a list of modules, such as plugins=[my_plugin]")
    for name in [modules] if isinstance(modules, str) else modules:
        _refuse_no_module(name)
        _import_builtins()
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.append(here)  # and left there: processes that are started from this one look for the module too
        try:
            with plugins.all_or_nothing(name, KINDS):
                importlib.import_module(name)
                _enter_recipes(name)
        except plugins.PluginError as error:
            advice = f'`python -c "import {name}"` shows where it fails'
            if error.absent:
                advice = "install it, or run this from the folder that it lies in"
            raise UserError(f"plugins: module {name!r} cannot be imported ({error}); {advice}") from None


def _enter_recipes(module: str) -> None:
    """Enter the folder recipes/ of a plug-in that is a package.

    Raises ValueError if a file in it has the name of one that dvae, or another plug-in, brings.
    """
    found = sys.modules[module]
    if not hasattr(found, "__path__") or found.__file__ is None:
        return
    folder = Path(found.__file__).parent / "recipes"
    if not folder.is_dir() or folder in RECIPE_FOLDERS:
        return
    for path in sorted(folder.rglob("*.yaml")):
        name = path.relative_to(folder)
        if owner := next((one for one in (FOLDER / "recipes", *RECIPE_FOLDERS) if (one / name).exists()), None):
            raise ValueError(f"its recipes/{name} has the name of {owner / name}: choose another")
    RECIPE_FOLDERS.append(folder)


def _refuse_no_module(name: object) -> None:
    """Raise UserError for what cannot be the name of a module."""
    text = str(name)
    if "/" in text or text.endswith(".py"):
        module = text.rpartition("/")[2].removesuffix(".py")
        raise UserError(
            f"plugins: {text!r} is a file: name its module, plugins=[{module}], and run this from the file's folder"
        )
    if not isinstance(name, str) or not all(part.isidentifier() for part in text.split(".")):
        raise UserError(f"plugins: {name!r} is no module: give a list of modules, such as plugins=[my_plugin]")


def origin(cls: type) -> tuple[str, str]:
    """The package that a component comes from, and its version."""
    package = cls.__module__.partition(".")[0]
    if package == "dvae":
        return package, VERSION
    distributions = [name for name in importlib.metadata.packages_distributions().get(package, []) if name]
    if not distributions:
        return package, "(not installed as a package)"
    return package, str(importlib.metadata.version(distributions[0]) or "(no version)")
