"""The registry of components.

A component is one class in one file. The registry finds it by name, and its own typed Config holds its settings.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING as DATACLASS_MISSING
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar, cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from dvae.errors import UserError, fold, reason_of, suggest

T = TypeVar("T")
NAME = re.compile("[a-z0-9_]+")
"""Pattern that the name of a component must match."""


@dataclass(kw_only=True, slots=True)
class ComponentConfig:
    """Base class of every component's nested Config. Subclasses are dataclasses with `kw_only=True, slots=True`."""

    name: str = MISSING
    """Name of the component in its registry. The registry sets it; do not set it by hand."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Shapes of the tensors that a component receives and returns."""

    image_size: int
    """Height and width of the images x, in pixels."""
    channels: int = 3
    """Channels C of the images."""
    k: int = 1
    """Components of the diffusion state per channel: u is (B, k*C, H, W). 1 for vp, 2 for cld and psld."""
    outputs: int = 0
    """Components per channel that the refiner predicts (0: all k)."""
    latent: tuple[int, ...] = ()
    """Shape of one latent z: (D,) for a vector, (C, h, w) for a map, () if the latent is not known yet."""
    condition_channels: int = 0
    """Channels of the image condition, which is concatenated to u (0: no image condition)."""
    condition_latent: bool = False
    """Whether the refiner receives z as a condition (latent guidance)."""
    labels: int = 0
    """Number of classes (0: no labels)."""

    @property
    def input_channels(self) -> int:
        """Number of input channels of a refiner: the state u concatenated with the image condition."""
        return self.k * self.channels + self.condition_channels

    @property
    def output_channels(self) -> int:
        """Number of output channels of a refiner."""
        return (self.outputs or self.k) * self.channels


class Registry(Generic[T]):
    """Registry of the components of one kind, by name.

    Args:
        kind: Name of the kind. It is also the Hydra config group, as in `schedule=linear`.
        package: Package whose modules hold the built-in components of this kind.
        base: Abstract class from which every component derives. If it has a Config, the components' Configs derive
            from that Config.
        optional: Whether a run may have no component of this kind (`classifier: null`).
    """

    chosen = True
    """Whether a run chooses one component of this kind in its settings. The field has the name of the kind."""

    def __init__(self, kind: str, package: str, base: Callable[..., T], optional: bool = False) -> None:
        self.kind = kind
        self.package = package
        # the parameter is typed as a Callable, because mypy rejects an abstract class as an argument for type[T]
        self.base: type = cast(type, base)
        self.optional = optional
        self._classes: dict[str, type[T]] = {}
        self._imported = False
        KINDS[kind] = self

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Return a class decorator that registers the class as `name` and its Config in Hydra's ConfigStore.

        Raises TypeError or ValueError if `check_component` does. Raises ValueError if `name` is already registered.
        Nothing is registered if an error is raised.
        """

        if isinstance(name, type):
            raise TypeError(f"{self.kind} {name.__name__}: register takes a name: write .register('my_{self.kind}')")

        def enter(cls: type[T]) -> type[T]:
            owner = self._classes.get(name) if isinstance(name, str) else None
            if owner is None:
                node = self.check_component(name, cls)
            else:
                raise ValueError(
                    f"{self.kind} {name!r} of {cls.__module__} is registered already, by {owner.__module__}: "
                    "choose another name"
                )
            self._classes[name] = cls
            if self.chosen:
                ConfigStore.instance().store(group=self.kind, name=name, node=node, provider=cls.__module__)
            return cls

        return enter

    def check_component(self, name: object, cls: Any) -> DictConfig:
        """Check that `cls` can be registered as `name`.

        Returns the default Config of `cls` as an OmegaConf node.

        Raises:
            ValueError: `name` has other characters than lower-case letters, digits and underscores.
            TypeError: `name` is not text, `cls` does not derive from `base`, an abstract method is not implemented,
                or the nested Config is missing or has a field without a valid default.
        """
        if not isinstance(name, str):
            raise TypeError(f"{self.kind} {name!r}: a name is text, such as 'my_{self.kind}'")
        if not NAME.fullmatch(name):
            raise ValueError(f"{self.kind} {name!r}: a name has lower-case letters, digits and underscores only")
        if not (isinstance(cls, type) and self.base in cls.__mro__):
            raise TypeError(f"{self.kind} {name!r} ({cls!r}) must be a class that derives from {_place(self.base)}")
        what = f"{self.kind} {name!r} ({_place(cls)})"
        if missing := sorted(getattr(cls, "__abstractmethods__", ())):
            raise TypeError(f"{what} must implement {', '.join(missing)}, as {_place(self.base)} says")
        return self._check_config(name, cls, what)

    def _check_config(self, name: str, cls: type, what: str) -> DictConfig:
        """Return the default Config of a component as a node. Raises TypeError if it has no valid nested Config."""
        config, base = cls.__dict__.get("Config"), getattr(self.base, "Config", ComponentConfig)
        if not (inspect.isclass(config) and issubclass(config, base) and _is_plain_dataclass(config)):
            raise TypeError(
                f"{what} needs a nested @dataclass(kw_only=True, slots=True) class Config({base.__qualname__})"
            )
        for field in fields(config):
            if field.default is DATACLASS_MISSING and field.default_factory is DATACLASS_MISSING:
                raise TypeError(f"{what}: Config.{field.name} has no default: give it one")
        try:
            node = OmegaConf.structured(config(name=name))
        except Exception as error:
            raise TypeError(f"{what}: Config cannot be built from its defaults ({reason_of(error)})") from error
        return node

    def import_builtins(self) -> None:
        """Import the built-in components of this kind. Further calls do nothing."""
        if self._imported:
            return
        self._imported = True  # set first, because a component module may look up the registry while it is imported
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")

    def _discover(self) -> None:
        """Import all built-in components of this kind and all installed plug-ins."""
        self.import_builtins()
        for hook in BEFORE_LOOKUP:
            hook()

    def names(self) -> list[str]:
        """Return the names of all components of this kind, sorted."""
        self._discover()
        return sorted(self._classes)

    def get(self, name: str) -> type[T]:
        """Return the class registered as `name`. Raises UserError, with the nearest known name, if there is none."""
        self._discover()
        if name not in self._classes:
            raise UserError(f"unknown {self.kind} {name!r}: {suggest(name, self._classes)}{broken_plugins_note()}")
        return self._classes[name]

    def name_of(self, component: T) -> str:
        """Return the registered name of a component's class, or the name of the class if it is not registered."""
        return self.name_of_class(type(component))

    def name_of_class(self, cls: type[T]) -> str:
        """Return the name under which a class is registered, or its own name if it is not registered."""
        names = {known: name for name, known in self._classes.items()}
        return names.get(cls, cls.__name__)

    def config(self, node: Any) -> ComponentConfig:
        """Return the typed Config of a node.

        `node` is a mapping or DictConfig that has a `name`. A typed Config is returned unchanged. Raises UserError if
        the name is unknown, a field does not exist, or a value has the wrong type.
        """
        if isinstance(node, ComponentConfig):
            return node
        plain: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        if not isinstance(plain, Mapping) or not isinstance(plain.get("name"), str):
            what = f"is {plain!r:.80}" if not isinstance(plain, Mapping) else "names no component"
            raise UserError(f"{self.kind} {what}: give a mapping with a name, {{name: {self.names()[0]}}}")
        plain = dict(plain)
        cls = self.get(plain["name"])
        schema = OmegaConf.structured(cls.Config)  # type: ignore[attr-defined]
        try:
            return OmegaConf.to_object(OmegaConf.merge(schema, plain))  # type: ignore[return-value]
        except ConfigKeyError as error:
            known = [f.name for f in fields(cls.Config)]  # type: ignore[attr-defined]
            wrong = next((key for key in plain if key not in known), error.full_key)
            raise UserError(
                f"{self.kind}.{wrong} is not a field of {plain['name']!r}: {suggest(str(wrong), known)}"
            ) from None
        except OmegaConfBaseException as error:
            raise UserError(f"{self.kind}.{error.full_key}: {fold(str(error.msg).splitlines()[0])}") from None

    def build(self, node: Any, shapes: Shapes) -> T:
        """Build the component that `node` describes, for tensors of the given shapes."""
        config = self.config(node)
        return self.get(config.name)(config, shapes)  # type: ignore[call-arg]


KINDS: dict[str, Registry[Any]] = {}
BEFORE_LOOKUP: list[Callable[[], None]] = []
"""Functions that are called before each lookup.

registry/discovery.py appends the import of installed plug-ins to this list. This file cannot call discovery.py itself,
because discovery.py imports this file.
"""
BROKEN_PLUGINS: dict[str, str] = {}
"""Installed plug-ins whose import failed -> reason of the failure."""


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_plain_dataclass(config: type) -> bool:
    """Whether the class itself is declared with @dataclass(kw_only=True, slots=True)."""
    declared = "__dataclass_fields__" in vars(config) and "__slots__" in vars(config)
    return declared and all(field.kw_only for field in fields(config))


def broken_plugins_note() -> str:
    """Return a note that lists installed plug-ins whose import failed; empty if none failed."""
    if not BROKEN_PLUGINS:
        return ""
    return "; plugins that failed to load: " + ", ".join(f"{name}: {why}" for name, why in BROKEN_PLUGINS.items())
