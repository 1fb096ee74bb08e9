"""The registry: a component is one class in one file, found by name, configured by its own typed Config."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

import dvae
from dvae.errors import UserError, near, one_line

T = TypeVar("T")
ENTRY_POINT_GROUP = "dvae.plugins"


@dataclass(kw_only=True, slots=True)
class ComponentConfig:
    """Base of every component's nested Config. Subclasses are dataclasses with `kw_only=True, slots=True`."""

    name: str = MISSING
    """The component's name in its registry; set by `register`, never by hand."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What a component must know of the tensors around it, so that it never guesses."""

    image_size: int
    """Height and width of the images x, in pixels."""
    channels: int = 3
    """Channels C of the images."""
    k: int = 1
    """Components of the diffusion state per channel: u is (B, k*C, H, W); 1 for vp, 2 for cld and psld."""
    outputs: int = 0
    """Components that the refiner predicts per channel (0: all k)."""
    latent: tuple[int, ...] = ()
    """Shape of one latent z: (D,) is a vector, (C, h, w) a map, () where there is none yet."""
    condition_channels: int = 0
    """Channels of the image condition that is concatenated to u (0: none)."""
    condition_latent: bool = False
    """Whether the refiner is given z (latent guidance)."""
    labels: int = 0
    """Number of classes (0: no labels)."""

    @property
    def output_channels(self) -> int:
        """Channels of a refiner's output."""
        return (self.outputs or self.k) * self.channels


class Registry(Generic[T]):
    """Components of one kind, by name. `kind` is also the Hydra config group (`schedule=linear`).

    A run may do without a component of an `optional` kind (`classifier: null`).
    """

    def __init__(self, kind: str, package: str, optional: bool = False) -> None:
        self.kind = kind
        self.package = package
        self.optional = optional
        self._classes: dict[str, type[T]] = {}
        KINDS[kind] = self

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: enter the class under `name` and its Config in Hydra's ConfigStore.

        Raises TypeError where the class has no nested `Config(ComponentConfig)`, ValueError on a duplicate name.
        """

        def enter(cls: type[T]) -> type[T]:
            config = cls.__dict__.get("Config")
            if not (inspect.isclass(config) and issubclass(config, ComponentConfig) and "__slots__" in vars(config)):
                raise TypeError(
                    f"{self.kind} {name!r} ({cls.__module__}.{cls.__qualname__}) needs a nested "
                    "@dataclass(kw_only=True, slots=True) class Config(ComponentConfig)"
                )
            owner = self._classes.get(name)
            if owner is not None:
                raise ValueError(
                    f"{self.kind} {name!r} of {cls.__module__} is registered already, by {owner.__module__}"
                )
            self._classes[name] = cls
            node = OmegaConf.structured(config(name=name))
            ConfigStore.instance().store(group=self.kind, name=name, node=node, provider=cls.__module__)
            return cls

        return enter

    def names(self) -> list[str]:
        discover()
        return sorted(self._classes)

    def get(self, name: str) -> type[T]:
        """The class registered as `name`. Raises UserError with the nearest name where there is none."""
        discover()
        if name not in self._classes:
            raise UserError(f"unknown {self.kind} {name!r}: {near(name, self._classes)}{broken_plugins()}")
        return self._classes[name]

    def name_of(self, component: T) -> str:
        """The name that a component's class is registered by, or the class's own where it is not."""
        names = {cls: name for name, cls in self._classes.items()}
        return names.get(type(component), type(component).__name__)

    def config(self, node: Any) -> ComponentConfig:
        """The typed Config of a node (mapping or DictConfig with `name`; or typed already).

        Raises UserError on an unknown name, a foreign field or a wrong type.
        """
        if isinstance(node, ComponentConfig):
            return node
        plain: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else dict(node)
        cls = self.get(str(plain.get("name")))
        schema = OmegaConf.structured(cls.Config)  # type: ignore[attr-defined]
        try:
            return OmegaConf.to_object(OmegaConf.merge(schema, plain))  # type: ignore[return-value]
        except ConfigKeyError as error:
            known = [f.name for f in fields(cls.Config)]  # type: ignore[attr-defined]
            wrong = next((key for key in plain if key not in known), error.full_key)
            raise UserError(
                f"{self.kind}.{wrong} is not a field of {plain['name']!r}: {near(str(wrong), known)}"
            ) from None
        except OmegaConfBaseException as error:
            raise UserError(f"{self.kind}.{error.full_key}: {one_line(error.msg)}") from None

    def build(self, node: Any, io: Shapes) -> T:
        """The component that `node` describes, built for the shapes `io`."""
        config = self.config(node)
        return self.get(config.name)(config, io)  # type: ignore[call-arg]


KINDS: dict[str, Registry[Any]] = {}
_broken: dict[str, str] = {}
_discovered = False


def discover() -> None:
    """Import every built-in component, then every installed plugin (entry points `dvae.plugins`), once.

    A plugin that fails to import is remembered and named where a component is not found; it never breaks others.
    """
    global _discovered
    if _discovered:
        return
    _discovered = True  # first, since component modules may ask a registry while they are imported
    importlib.import_module("dvae.registry")  # fills KINDS

    for registry in list(KINDS.values()):
        package = importlib.import_module(registry.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{registry.package}.{module.name}")
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry.load()
        except Exception as error:  # noqa: BLE001 a stranger's package may raise anything; it is reported, not hidden
            _broken[f"{entry.name} ({entry.value})"] = f"{type(error).__name__}: {one_line(error)}"


def load_plugins(modules: Iterable[str]) -> None:
    """Import the modules of `plugins=[...]`, which register components. Raises UserError where one cannot be."""
    discover()
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 as above
            raise UserError(
                f"plugins: module {name!r} cannot be imported ({type(error).__name__}: {one_line(error)}); "
                "install it or put its folder on PYTHONPATH"
            ) from None


def broken_plugins() -> str:
    """A note on installed plugins that failed to import, or nothing."""
    if not _broken:
        return ""
    return "; plugins that failed to load: " + ", ".join(f"{name}: {why}" for name, why in _broken.items())


def origin(cls: type) -> tuple[str, str]:
    """The package that a component comes from, and its version."""
    package = cls.__module__.partition(".")[0]
    if package == "dvae":
        return package, dvae.__version__
    distributions = importlib.metadata.packages_distributions().get(package)
    return package, importlib.metadata.version(distributions[0]) if distributions else "(not installed as a package)"
