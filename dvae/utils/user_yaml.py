"""Read YAML files that a user writes by hand.

Aliases and merge keys are allowed. The number of values is limited. Syntax errors, duplicate keys, bad aliases and too
deep nesting are reported with their line numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader

from dvae.errors import fold
from dvae.utils.read import DamagedFile, read_text

LIMIT = 2**22
"""Maximum size of the file, in bytes."""
MOST_VALUES = 200_000
"""Maximum number of values. Each use of an alias counts all the values that it refers to."""
DEPTH = 64
"""Maximum nesting of lists and mappings."""
_FAST = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The loader written in C, if PyYAML was built with it."""


def read_user_yaml(path: str | Path, dialect: str = "omegaconf") -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Its values are strings, numbers, booleans, null, lists, and mappings whose keys are strings.

    Args:
        path: The file.
        dialect: Which plain words are numbers. "omegaconf" reads 1e-3 as a number. "yaml" reads it as a string, as
            PyYAML and W&B do.

    Raises:
        DamagedFile: The file has a syntax error, a duplicate key, a value of another type, an unknown tag, or an alias
            that refers to itself; it has too many values or is nested too deeply; or it is not a mapping.
        OSError: The file does not exist.
    """
    text = read_text(path, LIMIT)
    loader = get_yaml_loader() if dialect == "omegaconf" else yaml.SafeLoader
    try:
        _refuse_deep(text, path)
        node = yaml.compose(text, Loader=_FAST)
        if node is not None:
            _Sizes(path).of(node)
        value = yaml.load(text, Loader=loader)  # both loaders are safe: they build only plain values
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFile(path, f"is not valid YAML ({fold(error)[:300]})") from None
    if not isinstance(value, dict):
        raise DamagedFile(path, "is not a mapping")
    _refuse_odd_values(value, path, "")
    return value


def _refuse_deep(text: str, path: str | Path) -> None:
    """Raise DamagedFile if the nesting is too deep.

    This must be checked before `yaml.compose`: its C code recurses once per level.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_FAST):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH:
            raise DamagedFile(path, f"is nested too deeply, line {event.start_mark.line + 1}")


class _Sizes:
    """Count the values and the nesting of YAML nodes without building the values.

    The values of an alias count once for each use of it.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._known: dict[int, tuple[int, int] | None] = {}
        """Number of values and nesting by node id. None while the node is being counted."""

    def of(self, node: yaml.Node) -> tuple[int, int]:
        """Return the number of values in `node`, and their nesting.

        Raises DamagedFile for too many values, too deep nesting, an alias that refers to itself, and a duplicate key.
        """
        if id(node) in self._known:
            known = self._known[id(node)]
            if known is None:  # the node contains itself
                raise DamagedFile(self._path, f"an alias stands for itself{_line(node)}")
            return known
        self._known[id(node)] = None
        count, depth = 1, 0
        for part in self._parts(node):
            values, below = self.of(part)
            count, depth = count + values, max(depth, below + 1)
            if count > MOST_VALUES:
                raise DamagedFile(self._path, f"holds more than {MOST_VALUES} values, aliases counted each time")
            if depth > DEPTH:
                raise DamagedFile(self._path, f"is nested too deeply{_line(part)}")
        self._known[id(node)] = count, depth
        return count, depth

    def _parts(self, node: yaml.Node) -> list[yaml.Node]:
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                    if key.value in seen:
                        raise DamagedFile(self._path, f"the key {key.value[:80]!r} is there twice{_line(key)}")
                    seen.add(key.value)
            return [part for pair in node.value for part in pair]
        return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _line(node: yaml.Node) -> str:
    return f", line {node.start_mark.line + 1}" if node.start_mark else ""


def _refuse_odd_values(value: Any, path: str | Path, place: str) -> None:
    """Raise DamagedFile for a key that is not a string, and for dates, bytes and sets."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise DamagedFile(path, f"{place or 'it'} has the key {repr(key)[:80]}: write keys as text, in quotes")
            _refuse_odd_values(item, path, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _refuse_odd_values(item, path, f"{place}[{number}]")
    elif not (value is None or isinstance(value, str | int | float)):
        raise DamagedFile(path, f"{place} is {repr(value)[:80]}, not text or a number: write it in quotes")
