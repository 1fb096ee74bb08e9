"""Import the built-in components of dvae, and plug-ins: installed ones, and modules named in `plugins=[...]`."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dvae.errors import UserError, printable_line
from dvae.registry import plugins
from dvae.registry.core import BEFORE_LOOKUP, BROKEN_PLUGINS, KINDS, Registry
from dvae.utils.package import FOLDER, VERSION
from dvae.utils.read import read_yaml

ENTRY_POINT_GROUP = "dvae.plugins"
"""Group of entry points with which an installed package declares a plug-in."""
RECIPE_FOLDERS: list[Path] = []
"""The folders recipes/ of the imported plug-ins. Each has the layout of the folder recipes/ of dvae."""
_imported_installed = False


def registries() -> dict[str, Registry[Any]]:
    """Return the registry of every kind of component, in alphabetical order of the kinds."""
    _import_kinds()
    return dict(sorted(KINDS.items()))


def chosen_kinds() -> dict[str, Registry[Any]]:
    """Return the registries of the kinds of which a run chooses one component. These are all kinds but the stages."""
    return {kind: registry for kind, registry in registries().items() if registry.chosen}


@functools.cache
def _import_kinds() -> None:
    """Import the base module of every kind, which adds its registry to KINDS. No component is imported."""
    for folder in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if folder.ispkg:
            importlib.import_module(f"{__package__}.{folder.name}.base")


def discover() -> None:
    """Import every built-in component, then every installed plug-in (entry points `dvae.plugins`), once."""
    _import_builtins()
    import_installed_plugins()


def _import_builtins() -> None:
    for registry in registries().values():
        registry.import_builtins()


def import_installed_plugins() -> None:
    """Import every installed plug-in, once.

    If there is a plug-in, the built-in components are imported first, because a plug-in must not use their names. All
    registrations of a plug-in that cannot be imported are undone. Messages about an unknown component name it.
    """
    global _imported_installed
    if _imported_installed:
        return
    # Set this before the imports: a plug-in may look up a component while it is imported, which calls this function.
    _imported_installed = True
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        _import_builtins()
        try:
            module = entry.value.partition(":")[0].strip()
            with _recipes_kept(), plugins.all_or_nothing(module, KINDS):
                entry.load()
                _enter_recipes(module)
        except plugins.PluginError as error:
            BROKEN_PLUGINS[printable_line(f"{entry.name} ({entry.value})")] = str(error)


BEFORE_LOOKUP.append(import_installed_plugins)


def load_plugins(modules: Iterable[str]) -> None:
    """Import the modules of `plugins=[...]`, which register components. Raises UserError if one cannot be imported.

    If there is a module, the built-in components are imported first, because a plug-in must not use their names. The
    working directory is the last place in which modules are searched.
    """
    import_installed_plugins()
    if isinstance(modules, Mapping) or not isinstance(modules, Iterable):
        raise UserError(f"plugins={modules!r}: give a list of modules, such as plugins=[my_plugin]")
    for name in [modules] if isinstance(modules, str) else modules:
        _refuse_no_module(name)
        _import_builtins()
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.append(here)  # not removed: child processes inherit sys.path, and must find the module too
        try:
            with _recipes_kept(), plugins.all_or_nothing(name, KINDS):
                importlib.import_module(name)
                _enter_recipes(name)
        except plugins.PluginError as error:
            advice = f'`python -c "import {name}"` shows where it fails'
            if error.absent:
                advice = "install it, or run this command in the folder that contains it"
            raise UserError(f"plugins: module {name!r} cannot be imported ({error}); {advice}") from None


@contextmanager
def _recipes_kept() -> Iterator[None]:
    """Remove the recipes that a plug-in has added if the block raises PluginError."""
    before = list(RECIPE_FOLDERS)
    try:
        yield
    except plugins.PluginError:
        RECIPE_FOLDERS[:] = before
        raise


def _enter_recipes(module: str) -> None:
    """Add the folder recipes/ of a plug-in to RECIPE_FOLDERS, if the plug-in is a package and has this folder.

    Raises ValueError if dvae or another plug-in has a recipe file of the same name.
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
        _check_recipe(path, name)
    RECIPE_FOLDERS.append(folder)


def _check_recipe(path: Path, name: Path) -> None:
    """Raise ValueError for a file in a plug-in's folder recipes/ that Hydra could not use."""
    content = read_yaml(path)
    kind = name.parts[0]
    if kind in KINDS and path.stem in KINDS[kind]._classes:
        raise ValueError(f"its recipes/{name} has the name of a component: choose another")
    if len(name.parts) != 2 or kind not in ("recipe", *chosen_kinds()):
        raise ValueError(f"its recipes/{name} lies in no folder recipe/ and in none of a kind of components")
    if not isinstance(content.get("defaults", []), list):
        raise ValueError(f"its recipes/{name} has defaults that are no list")
    if kind != "recipe":
        return
    if not path.read_text(encoding="utf-8").startswith("# @package _global_\n"):
        raise ValueError(f"its recipes/{name} must begin with the line `# @package _global_`")
    if not isinstance(content.get("recipe"), str):
        raise ValueError(f"its recipes/{name} has no name: add the line `recipe: {path.stem}`")


def _refuse_no_module(name: object) -> None:
    """Raise UserError if `name` cannot be the name of a module."""
    text = str(name)
    if "/" in text or text.endswith(".py"):
        module = text.rpartition("/")[2].removesuffix(".py")
        raise UserError(
            f"plugins: {text!r} is a file: name its module, plugins=[{module}], and run this from the file's folder"
        )
    if not isinstance(name, str) or not all(part.isidentifier() for part in text.split(".")):
        raise UserError(f"plugins: {name!r} is no module: give a list of modules, such as plugins=[my_plugin]")


def origin(cls: type) -> tuple[str, str]:
    """Return the package that provides a component, and the version of the package."""
    package = cls.__module__.partition(".")[0]
    if package == "dvae":
        return package, VERSION
    distributions = [name for name in importlib.metadata.packages_distributions().get(package, []) if name]
    if not distributions:
        return package, "(not installed as a package)"
    return package, str(importlib.metadata.version(distributions[0]) or "(no version)")
