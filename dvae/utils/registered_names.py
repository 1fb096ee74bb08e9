"""The names of components and stages, read from source files: nothing is imported."""

from __future__ import annotations

import ast
from pathlib import Path

from dvae.utils.class_fields import ClassSource, parsed
from dvae.utils.package import FOLDER


def registered_in(folder: Path) -> dict[str, ClassSource]:
    """The classes in the files of a folder that are decorated with `REGISTRY.register("name")`, sorted by name."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        for node in parsed(path).body:
            if isinstance(node, ast.ClassDef) and (name := _registered_name(node)) is not None:
                found[name] = ClassSource(path, node)
    return dict(sorted(found.items()))


def _registered_name(node: ast.ClassDef) -> str | None:
    for call in node.decorator_list:
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "register":
            (name,) = call.args
            return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else None
    return None


def component_folders() -> dict[str, Path]:
    """The folder of each kind of components that dvae brings, by the kind's name in a run's settings."""
    folders = {path.parent.name: path.parent for path in (FOLDER / "registry").glob("*/base.py")}
    folders["launchers"] = FOLDER / "launchers"
    del folders["stages"]
    return {SINGULAR.get(name, name.removesuffix("s")): folder for name, folder in sorted(folders.items())}


SINGULAR = {"processes": "process"}
"""Names of folders that are not a kind's name with an s."""
