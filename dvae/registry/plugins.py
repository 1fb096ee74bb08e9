"""Import plug-ins, and undo the import if it fails.

A plug-in is a Python package that somebody else wrote. Importing it executes its code, which may fail in any way.
A failure is reported as one line, and the registries and Hydra's ConfigStore are restored to their earlier state.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from hydra.core.config_store import ConfigStore

from dvae.errors import Stopped, reason_of
from dvae.registry.core import Registry


class PluginError(Exception):
    """A plug-in cannot be used. The message is one line that gives the reason."""

    def __init__(self, module: str, error: BaseException) -> None:
        super().__init__(reason_of(error))
        lacks = error.name if isinstance(error, ModuleNotFoundError) else None
        self.absent = lacks is not None and f"{module}.".startswith(f"{lacks}.")
        """Whether the module itself, or a package that contains it, does not exist."""


@contextmanager
def all_or_nothing(module: str, kinds: dict[str, Registry[Any]]) -> Iterator[None]:
    """Run a block that imports the plug-in `module`, and undo all its registrations if the block fails.

    Text that the plug-in prints during the import goes to stderr, because the stdout of a tool may be data.

    Raises PluginError if the block fails, exits the program, or changes components that existed before.
    """
    before = RegistrySnapshot(kinds)
    printed = CapturedOutput()
    importlib.invalidate_caches()  # else Python may not find a file that was written a moment ago
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            yield
        before.refuse_changes()
    except (KeyboardInterrupt, Stopped):  # a request to stop dvae, not a fault of the plug-in
        before.restore(module)
        raise
    except BaseException as error:  # noqa: BLE001 SystemExit too: plug-in code may raise anything
        before.restore(module)
        printed.drop()
        raise PluginError(module, error) from None
    finally:
        printed.release()


class RegistrySnapshot:
    """A snapshot of the registries, Hydra's ConfigStore and the set of imported modules."""

    def __init__(self, kinds: dict[str, Registry[Any]]) -> None:
        self.kinds = kinds
        self._registries = dict(kinds)
        self._tables = {kind: registry._classes for kind, registry in kinds.items()}
        self._classes = {kind: dict(table) for kind, table in self._tables.items()}
        self._configs = _copy(ConfigStore.instance().repo)
        self._modules = set(sys.modules)

    def refuse_changes(self) -> None:
        """Raise an error if existing components or configs were replaced or removed.

        Components that were added without `register` are checked here, with `Registry.check_component`.

        Raises TypeError, or ValueError if an added component has a bad name.
        """
        if self.kinds != self._registries:
            changed = [kind for kind in {**self.kinds, **self._registries} if not self._has_kind(kind)]
            raise TypeError(f"it changes the registry of the kind {changed[0]!r}; a plug-in may only add components")
        for kind, registry in self._registries.items():
            for name, cls in self._classes[kind].items():
                if registry._classes.get(name) is not cls:
                    raise TypeError(f"it replaces or removes the {kind} {name!r}; a plug-in may only add components")
            for name in registry._classes.keys() - self._classes[kind].keys():
                registry.check_component(name, registry._classes[name])
        configs = dict(_leaves(ConfigStore.instance().repo))
        for path, node in _leaves(self._configs):
            if configs.get(path) is not node:
                raise TypeError(f"it replaces or removes the config {path!r}; a plug-in may only add configs")

    def _has_kind(self, kind: str) -> bool:
        return self.kinds.get(kind) is self._registries.get(kind)

    def restore(self, module: str) -> None:
        """Restore the earlier state, and remove the plug-in's modules so that it can be imported again."""
        tops = {_top(module)}
        for kind, table in self._tables.items():
            registry, earlier = self._registries[kind], self._classes[kind]
            found = registry._classes if isinstance(registry._classes, dict) else {}
            tops |= {_top(cls.__module__) for name, cls in found.items() if name not in earlier and _is_component(cls)}
            table.clear()
            table.update(earlier)
            registry._classes = table
        self.kinds.clear()
        self.kinds.update(self._registries)
        self._restore_configs()
        tops -= {"dvae", "__main__"} | sys.stdlib_module_names
        for name in set(sys.modules) - self._modules:
            if _top(name) in tops:
                del sys.modules[name]

    def _restore_configs(self) -> None:
        """Restore the configs, but keep new configs of dvae's own modules.

        The plug-in may have imported modules of dvae. These stay imported, so their configs are not stored again.
        """
        store, earlier = ConfigStore.instance(), dict(_leaves(self._configs))
        added = [node for path, node in _leaves(store.repo) if path not in earlier]
        store.repo = self._configs
        for node in added:
            if getattr(node, "provider", None) == "dvae":
                store.store(node.name, node.node, node.group, node.package, node.provider)


def _is_component(cls: Any) -> bool:
    return isinstance(cls, type) and isinstance(cls.__module__, str)


def _top(module: str) -> str:
    return module.partition(".")[0]


def _copy(repo: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the nested dicts of a ConfigStore. The nodes are not copied."""
    return {name: _copy(item) if isinstance(item, dict) else item for name, item in repo.items()}


def _leaves(repo: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in repo.items():
        if isinstance(item, dict):
            yield from _leaves(item, f"{prefix}{name}/")
        else:
            yield prefix + name.removesuffix(".yaml"), item


class CapturedOutput:
    """A text stream that stores the text written to it.

    `release` writes the stored text to stderr. Text that is written later goes to stderr at once: a logging handler
    that was created during the import may keep this stream and use it afterwards.
    """

    def __init__(self) -> None:
        self._stream = sys.stderr
        self._text: list[str] | None = []

    def write(self, text: str) -> int:
        if self._text is None:
            return self._stream.write(text)
        self._text.append(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def drop(self) -> None:
        """Discard the stored text, because the error line gives the reason of the failure."""
        self._text = []

    def release(self) -> None:
        """Write the stored text to stderr, and pass on all later text at once."""
        text, self._text = "".join(self._text or []), None
        if text:
            self._stream.write(text)

    def close(self) -> None:
        """Do nothing, because the plug-in does not own stderr."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
