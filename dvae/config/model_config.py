"""The settings of a run that inference needs: built from a run, written into a bundle, and read back.

A bundle may come from an untrusted source. Therefore its settings hold plain values only: no paths, no commands, no
references to environment variables and no lists of modules. `read_model_config` rejects everything else before any
network is built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dvae.config.schema import ModelConfig, Precision, RunConfig
from dvae.data.images import Crop, Resize
from dvae.diffusion.denoiser import DenoiserConfig
from dvae.errors import UserError, fold, suggest
from dvae.registry.core import ComponentConfig, Registry
from dvae.registry.discovery import registries
from dvae.utils.read import DamagedFile, check, forbid_extra, read_yaml

T = TypeVar("T")
E = TypeVar("E", bound=Enum)
COMPONENT_KINDS = ("encoder", "prior", "process", "schedule", "refiner", "sampler", "classifier")
"""Kinds of components that a bundle names."""
LARGEST = 2**20
"""Largest absolute value of an integer other than the seed. A larger width or step count would exhaust the memory."""
LONGEST_TEXT, LONGEST_LIST = 1000, 10_000
"""Largest number of characters of a text (and of entries of a mapping), and of entries of a list."""
SIZES = (1, 2048)
"""Smallest and largest image size, in pixels."""
AGAIN = "get a new copy of the bundle, or export it again"
"""Advice at the end of messages about a damaged bundle."""


@forbid_extra
@dataclass(frozen=True)
class ComponentInfo:
    """The class of a bundle's component, and the package that provides it."""

    name: str
    cls: str
    package: str
    version: str


@forbid_extra
@dataclass
class _Stored:
    """The fields of config.yaml with their plain types. Components are checked later, against their own Config."""

    recipe: str
    image_size: int
    channels: int
    classes: list[str]
    label: str
    seed: int
    precision: str
    crop: str
    resize: str
    encoder: dict[str, Any]
    prior: dict[str, Any]
    process: dict[str, Any]
    schedule: dict[str, Any]
    refiner: dict[str, Any]
    sampler: dict[str, Any]
    denoiser: dict[str, Any]
    classifier: dict[str, Any] | None = field(default=None)


def model_config(run: RunConfig) -> ModelConfig:
    """Return the settings of `run` that inference needs. Fields that name a place are set to their defaults."""
    components = {kind: _without_places(getattr(run, kind)) for kind in COMPONENT_KINDS}
    return ModelConfig(
        recipe=run.recipe,
        image_size=run.image_size,
        channels=run.channels,
        classes=list(run.classes),
        label=run.data.label,
        seed=run.seed,
        precision=run.training("refiner").precision,
        crop=_choice(run.source, "crop", Crop.center),
        resize=_choice(run.source, "resize", Resize.lanczos),
        denoiser=run.denoiser,
        **components,
    )


def _choice(source: Any, name: str, usual: T) -> T:
    """Return the source's field `name`, or `usual` if it has no such field or one of another type."""
    value = getattr(source, name, usual)
    return value if isinstance(value, type(usual)) else usual


def _without_places(config: ComponentConfig | None) -> ComponentConfig | None:
    if config is None:
        return None
    return replace(config, **places(type(config)))


def places(config: type[ComponentConfig]) -> dict[str, Any]:
    """Return the fields of a component that name a place, with their defaults.

    Such a field holds a path or an address. It is declared with metadata={"place": True}.
    """
    return {one.name: one.default for one in fields(config) if one.metadata.get("place")}


def to_yaml(config: ModelConfig) -> str:
    """Return `config` as YAML with plain values."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return OmegaConf.to_yaml(OmegaConf.create(plain))


def read_model_config(path: Path, components: Mapping[str, ComponentInfo]) -> ModelConfig:
    """Read and check a bundle's config.yaml.

    `components` is the information on the components in bundle.json, by kind. Raises UserError for a component that is
    not registered, an unknown field, a value of the wrong type or out of bounds, or a value that is not plain.
    """
    try:
        plain = read_yaml(path)
        refuse_unplain(plain, path)
        stored = check(_Stored, plain, path)
    except DamagedFile as error:
        raise UserError(f"{error}: {AGAIN}") from None
    for kind in COMPONENT_KINDS:
        if plain.get(kind) is not None:
            _require_registered(kind, registries()[kind], plain[kind], components.get(kind), path)
    if not SIZES[0] <= stored.image_size <= SIZES[1] or stored.channels not in (1, 2, 3):
        size = f"image_size={stored.image_size} channels={stored.channels}"
        raise UserError(f"{path}: {size}: a bundle has images of {SIZES[0]} to {SIZES[1]} pixels, 1 to 3 channels")
    if len(set(stored.classes)) < len(stored.classes):
        raise UserError(f"{path}: a class occurs more than once: {AGAIN}")
    return ModelConfig(
        recipe=stored.recipe,
        image_size=stored.image_size,
        channels=stored.channels,
        classes=stored.classes,
        label=stored.label,
        seed=stored.seed,
        precision=_member(Precision, stored.precision, "precision", path),
        crop=_member(Crop, stored.crop, "crop", path),
        resize=_member(Resize, stored.resize, "resize", path),
        denoiser=_denoiser(stored.denoiser, path),
        **{kind: _component(kind, plain.get(kind), path) for kind in COMPONENT_KINDS},
    )


def _member(kind: type[E], name: str, what: str, path: Path) -> E:
    if name not in kind.__members__:
        raise UserError(f"{path}: {what} {name[:80]!r}: {suggest(name[:80], kind.__members__)}")
    return kind[name]


def refuse_unplain(value: Any, path: object, key: str = "") -> None:
    """Raise DamagedFile if `value` contains a reference, a number out of bounds, or a very long text, list or mapping.

    The settings of a real model contain none of them. `path` and `key` are used in the message.
    """

    def refuse(why: str) -> NoReturn:
        raise DamagedFile(path, f"{key or 'a value'} {why}")

    if isinstance(value, dict):
        if len(value) > LONGEST_TEXT:
            refuse(f"has {len(value)} entries")
        for name, item in value.items():
            refuse_unplain(item, path, f"{key}.{name}"[-80:].lstrip("."))
    elif isinstance(value, list):
        if len(value) > LONGEST_LIST:
            refuse(f"has {len(value)} entries")
        for item in value:
            refuse_unplain(item, path, key)
    elif isinstance(value, str):
        if "${" in value or "$(" in value or "???" in value:
            refuse(f"holds a reference ({value[:60]}), but only plain values are allowed")
        if len(value) > LONGEST_TEXT:
            refuse(f"has {len(value)} characters")
    elif isinstance(value, int) and key != "seed" and abs(value) > LARGEST:
        refuse(f"is {value if abs(value) < 10**30 else 'a huge number'}, beyond {LARGEST}")
    elif isinstance(value, float) and not math.isfinite(value):
        refuse(f"is {value}, not a number")


def _require_registered(
    kind: str, registry: Registry[Any], node: dict[str, Any], info: ComponentInfo | None, path: Path
) -> None:
    """Raise UserError if a component is not registered. The message names the package that provides it."""
    name = node.get("name")
    if isinstance(name, str) and name in registry.names():
        return
    if info is None or info.name != name or info.package == "dvae":
        raise UserError(f"{path}: unknown {kind} {str(name)[:80]!r}: {suggest(str(name)[:80], registry.names())}")
    module = info.cls.rpartition(".")[0]
    raise UserError(
        f"{path} needs the {kind} {name!r} of the package {info.package}, version {info.version}, which is not loaded: "
        f"if you trust its code, install the package, or run this from its folder and add plugins=[{module}] "
        f"(in Python: import {module} first)"
    )


def _component(kind: str, node: dict[str, Any] | None, path: Path) -> ComponentConfig | None:
    registry = registries()[kind]
    if node is None:
        if not registry.optional:
            raise UserError(f"{path}: {kind} is missing: {AGAIN}")
        return None
    try:
        config = registry.config(node)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    for name, default in places(type(config)).items():
        if getattr(config, name) != default:
            raise UserError(f"{path}: {kind}.{name} names a place ({str(getattr(config, name))[:80]}): {AGAIN}")
    return config


def _denoiser(node: dict[str, Any], path: Path) -> DenoiserConfig:
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DenoiserConfig), node))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: denoiser: {fold(error).partition(' full_key')[0][:200]}") from None
