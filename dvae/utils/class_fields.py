"""The fields of a dataclass as a help text needs them, read from its source file: nothing is imported.

A field's meaning is the docstring below it. Importing the class instead would import torch, which takes seconds.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dvae.utils.package import FOLDER

REQUIRED = "required"
"""What stands in the place of the default of a field that has none."""


@dataclass(frozen=True)
class FieldText:
    """A field of a dataclass."""

    name: str
    """Its name, with the names of the fields that it lies in before it: data.flip."""
    type: str
    """Its type as the source has it; the choices, separated by |, if it is an enumeration."""
    default: str
    """Its default as it is written on the command line, or REQUIRED."""
    meaning: str
    """Its docstring on one line; empty if it has none."""


@dataclass(frozen=True)
class ClassSource:
    """A class in a source file."""

    path: Path
    node: ast.ClassDef

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (ast.get_docstring(self.node) or "").partition("\n")[0]


def find_class(module: str, name: str) -> ClassSource:
    """The class `name`, such as "UNet.Config", of a module. Raises LookupError if it is not found."""
    path = module_path(module)
    found = find_in(path, name) if path is not None else None
    if found is None:
        raise LookupError(f"{module} has no class {name}")
    return found


def fields_of(source: ClassSource, prefix: str = "") -> list[FieldText]:
    """The fields of a dataclass and of its base classes.

    A field that is a dataclass is replaced by the fields of that.
    """
    found: dict[str, FieldText] = {}
    for base in source.node.bases:
        if (parent := resolve(source.path, ast.unparse(base))) is not None:
            found |= {field.name: field for field in fields_of(parent, prefix)}
    return list((found | {field.name: field for field in _own_fields(source, prefix)}).values())


def _own_fields(source: ClassSource, prefix: str) -> Iterator[FieldText]:
    body = source.node.body
    for number, node in enumerate(body):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        after = body[number + 1] if number + 1 < len(body) else None
        if (source.node.name, node.target.id) != ("ComponentConfig", "name"):  # set by the registry, never by hand
            yield from _field(source, prefix + node.target.id, node, _text_of(after))


def _field(source: ClassSource, name: str, node: ast.AnnAssign, meaning: str) -> Iterator[FieldText]:
    kind = ast.unparse(node.annotation)
    found = resolve(source.path, kind.removesuffix(" | None"))
    if found is not None and _is_enum(found):
        kind = kind.replace(kind.removesuffix(" | None"), " | ".join(_members(found)))
    elif found is not None and _is_dataclass(found):
        yield from fields_of(found, f"{name}.")
        return
    yield FieldText(name, kind, _default(node.value, source.path), meaning)


def _text_of(node: ast.stmt | None) -> str:
    """The text of a docstring on one line, or nothing if the node is none."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(node.value.value.split())
    return ""


def _is_dataclass(source: ClassSource) -> bool:
    """Whether it is a dataclass; `Any` is a class too, and has no fields."""
    return any(ast.unparse(one).partition("(")[0] == "dataclass" for one in source.node.decorator_list)


def _is_enum(source: ClassSource) -> bool:
    return any("Enum" in ast.unparse(base) for base in source.node.bases)


def _members(source: ClassSource) -> list[str]:
    """The names of the members of an enumeration, by which a setting is written."""
    targets = [node.targets[0] for node in source.node.body if isinstance(node, ast.Assign)]
    return [target.id for target in targets if isinstance(target, ast.Name) and not target.id.startswith("_")]


def _default(value: ast.expr | None, path: Path) -> str:
    """The default of a field as the command line writes it."""
    if value is None:
        return REQUIRED
    if isinstance(value, ast.Call):  # field(default=...), field(default_factory=...)
        words = {word.arg: word.value for word in value.keywords}
        given = words.get("default", words.get("default_factory"))
        if isinstance(given, ast.Lambda):
            given = given.body
        return _written(given, path) if given is not None else REQUIRED
    return _written(value, path)


def _written(value: ast.expr, path: Path) -> str:
    if isinstance(value, ast.Call) and value.args and isinstance(value.args[0], ast.Name):  # list(CONSTANT), list(Enum)
        listed = resolve(path, value.args[0].id)
        if listed is not None and _is_enum(listed):
            return f"[{','.join(_members(listed))}]"
        value = _constant(path, value.args[0].id) or value
    if isinstance(value, ast.Attribute):  # a member of an enumeration
        return value.attr
    if isinstance(value, ast.Name):
        known = {"MISSING": REQUIRED, "list": "[]", "dict": "{}"}.get(value.id)
        constant = _constant(path, value.id) if known is None else None
        return known or (_written(constant, path) if constant is not None else value.id)
    if isinstance(value, ast.Constant) and (value.value is None or isinstance(value.value, bool)):
        return "null" if value.value is None else str(value.value).lower()
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return value.value or '""'
    if isinstance(value, ast.List | ast.Tuple):
        return f"[{','.join(_written(one, path) for one in value.elts)}]"
    return ast.unparse(value)


def _constant(path: Path, name: str) -> ast.expr | None:
    """The value of a constant of a file, or of the file that it is imported from."""
    for node in parsed(path).body:
        if isinstance(node, ast.Assign):
            targets = [ast.unparse(target) for target in node.targets]
            if targets == [name]:
                return node.value
            if isinstance(node.value, ast.Tuple) and targets[0].strip("()").split(", ").count(name) == 1:
                return node.value.elts[targets[0].strip("()").split(", ").index(name)]
        if isinstance(node, ast.ImportFrom) and node.module and name in {one.asname or one.name for one in node.names}:
            other = module_path(node.module)
            return _constant(other, name) if other is not None and other != path else None
    return None


def resolve(path: Path, name: str) -> ClassSource | None:
    """The class that a name in a file means: of that file, or of the file that it is imported from."""
    if not name.replace(".", "").isidentifier():
        return None
    if (found := find_in(path, name)) is not None:
        return found
    first = name.partition(".")[0]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.module and first in {one.asname or one.name for one in node.names}:
            other = module_path(node.module)
            return find_in(other, name) if other is not None and other != path else None
    return None


def find_in(path: Path, name: str) -> ClassSource | None:
    """The class `name`, such as "UNet.Config", in a file; None if there is none."""
    body: list[ast.stmt] = parsed(path).body
    found: ast.ClassDef | None = None
    for part in name.split("."):
        found = next((node for node in body if isinstance(node, ast.ClassDef) and node.name == part), None)
        if found is None:
            return None
        body = found.body
    return ClassSource(path, found) if found is not None else None


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_path(module: str) -> Path | None:
    """The source file of a module; of others than dvae only if it is imported, or has no package around it."""
    if module.partition(".")[0] == "dvae":
        place = FOLDER.joinpath(*module.split(".")[1:])
        return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    loaded = sys.modules.get(module)
    if loaded is not None:
        return Path(loaded.__file__) if loaded.__file__ else None
    if "." in module or module in sys.stdlib_module_names:
        return None
    spec = importlib.util.find_spec(module)
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None
