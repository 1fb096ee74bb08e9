"""Stages: the steps of a run, such as the training of the encoder. Each is a file in dvae/stages/ or in a plug-in.

This module holds the declarations of a stage that are needed to compose the settings of a run. dvae/stages/base.py
holds the base class for the work of a stage.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig

from dvae.config.schema import RunConfig, TrainingConfig, extended_run_config
from dvae.config.stage_names import TRAINING_PREFIX
from dvae.errors import UserError, suggest
from dvae.registry.core import ComponentConfig, Registry, broken_plugins_note


@dataclass(kw_only=True, slots=True)
class StageConfig(ComponentConfig):
    """Base class of the nested Config of a stage. Its fields are added to the settings of every run.

    They are at the top level of the settings, beside `seed` and `refiner`. A stage NAME that trains has a field
    `train_NAME: TrainingConfig`. Other settings of the stage can be grouped in a dataclass, as in `NAME: MyConfig`.
    """


C = TypeVar("C", bound=StageConfig)


class DeclaredStage(ABC):
    """The declarations of a stage. Stages derive from dvae.stages.base.Stage, which derives from this class."""

    Config: type[StageConfig] = StageConfig
    after: tuple[str, ...] = ()
    """Stages that run before this one, if a run has both."""
    before: tuple[str, ...] = ()
    """Stages that run after this one, if a run has both."""
    makes: tuple[str, ...] = ()
    """The parts of a run's models whose weights the stage writes: encoder, prior, denoiser, classifier."""
    all_ranks = False
    """Whether every rank runs the stage. Otherwise rank 0 runs it while the other ranks wait."""
    needs_gpus = True
    """Whether the stage uses GPUs. If not, and if it has a separate job, the job goes to launcher.cpu_partition."""
    own_job = False
    """Whether the stage gets a separate job with one task, on SLURM with launcher.chain=true."""
    in_parts = False
    """Whether several jobs can share the work of the stage (Stage.run_part)."""
    takes_streams = False
    """Whether the stage works with an endless source, which has no shards and no held-out images."""

    mutable: tuple[str, ...] = ()
    """Fields of its Config that may change from one attempt of a run to the next. Other changes are refused."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @property
    def name(self) -> str:
        return STAGES.name_of(self)

    def check_settings(self) -> None:  # noqa: B027 most stages have nothing to check
        """Raise UserError if this stage cannot work with the settings of its run. Called whenever they are read."""

    @abstractmethod
    def run(self, run: Any) -> None:
        """Do the work of the stage in a run's folder. `run` is a dvae.runs.folder.Run."""


RESERVED_FIELDS = ("defaults", "hydra")
"""Names that Hydra reads itself."""


def order_stages(stages: Mapping[str, type[DeclaredStage]]) -> list[str]:
    """Return the names of stages in an order that satisfies `after` and `before`.

    Among stages that may come next, the first name in the alphabet comes first. Raises UserError if `after` and
    `before` form a cycle.
    """
    earlier = {name: set(stage.after) for name, stage in stages.items()}
    for name, stage in stages.items():
        for later in stage.before:
            earlier.get(later, set()).add(name)
    found: list[str] = []
    while left := sorted(stages.keys() - set(found)):
        free = [name for name in left if earlier[name].isdisjoint(left)]
        if not free:
            raise UserError(f"stages {', '.join(left)}: each is declared to run before another one of them")
        found.append(free[0])
    return found


class StageRegistry(Registry[DeclaredStage]):
    """The registry of stages. It also determines their order, and checks the fields that they add to the settings."""

    chosen = False

    def check_component(self, name: object, cls: Any) -> DictConfig:
        """Check a stage as `Registry.check_component` does, and check the fields of its Config.

        Also raises TypeError if a run or another stage already has a field of this name, or if a field train_NAME has
        another NAME than the stage or another type than TrainingConfig.
        """
        if not (isinstance(cls, type) and issubclass(cls, DeclaredStage)):
            raise TypeError(f"stage {name!r} ({cls!r}) must be a class that derives from dvae.stages.base.Stage")
        for attribute in ("after", "before", "makes", "mutable"):
            value = getattr(cls, attribute)
            if not isinstance(value, tuple) or not all(isinstance(one, str) for one in value):
                raise TypeError(f"stage {name!r}: {attribute} is {value!r}: write a tuple, such as ('encoder',)")
        node = super().check_component(name, cls)
        taken = {field.name: "every run" for field in fields(RunConfig)}
        for other, theirs in self._classes.items():
            if other != name:
                taken |= dict.fromkeys(stage_fields(theirs), f"the stage {other!r}")
        order_stages({**self._classes, str(name): cls})  # raises UserError if there is no order
        for field, kind in stage_fields(cls).items():
            if field in taken:
                raise TypeError(f"stage {name!r}: Config.{field} is a field of {taken[field]}: use another name")
            if field in RESERVED_FIELDS or hasattr(RunConfig, field):
                raise TypeError(f"stage {name!r}: Config.{field}: this name is reserved: use another name")
            if field.startswith(TRAINING_PREFIX) and (field, kind) != (f"{TRAINING_PREFIX}{name}", TrainingConfig):
                raise TypeError(f"stage {name!r}: Config.{field}: write {TRAINING_PREFIX}{name}: TrainingConfig")
        return node

    def order(self, of: Collection[str] | None = None) -> list[str]:
        """Return the stages `of`, or all stages, in the order in which they run.

        The order satisfies `after` and `before`. Among stages that may come next, the first name in the alphabet comes
        first. Raises UserError for a stage that is not registered, and if `after` and `before` form a cycle.
        """
        names = self.names()
        for wrong in (name for name in of or () if name not in names):
            hint = "; a stage of a plug-in needs plugins=[MODULE]"
            raise UserError(f"unknown stage {wrong!r}: {suggest(wrong, self.order())}{hint}{broken_plugins_note()}")
        found = order_stages({name: self.get(name) for name in names})
        return [name for name in found if of is None or name in of]

    def trained(self) -> list[str]:
        """Return the stages that train, in their order."""
        return [name for name in self.order() if f"{TRAINING_PREFIX}{name}" in stage_fields(self.get(name))]


STAGES = StageRegistry("stage", "dvae.stages", DeclaredStage)


def stage_fields(stage: type[DeclaredStage]) -> dict[str, Any]:
    """Return the fields that a stage adds to the settings of a run, with their types."""
    types = get_type_hints(stage.Config)
    return {field: types[field] for field in _own_fields(stage.Config)}


def _own_fields(config: type[StageConfig]) -> list[str]:
    return [field.name for field in fields(config) if field.name != "name"]


def settings_of(config: RunConfig, kind: type[C]) -> C:
    """Return the settings of one stage, as its Config `kind`, from the settings of a run."""
    values: dict[str, Any] = {field: getattr(config, field) for field in _own_fields(kind)}
    return kind(**values)


def with_settings(config: RunConfig, settings: StageConfig) -> RunConfig:
    """Return a copy of `config` in which the fields of one stage have the values of `settings`."""
    changed: dict[str, Any] = {field: getattr(settings, field) for field in _own_fields(type(settings))}
    return replace(config, **changed)


def run_config_class() -> type[RunConfig]:
    """Return the class of a run's settings: RunConfig with the additional fields of all registered stages."""
    return _run_config_class(tuple(STAGES.get(name) for name in STAGES.order()))


@lru_cache(maxsize=8)
def _run_config_class(stages: tuple[type[DeclaredStage], ...]) -> type[RunConfig]:
    added = [(field, stage_fields(stage)[field.name]) for stage in stages for field in fields(stage.Config)
             if field.name != "name"]  # fmt: skip
    return extended_run_config(added)


def training_fields() -> tuple[str, ...]:
    """Return the fields of a run's settings that hold training settings, in the order of the stages."""
    return tuple(f"{TRAINING_PREFIX}{name}" for name in STAGES.trained())


def exported_parts() -> dict[str, str]:
    """Return the stages that train exactly one part of a run's models, each with this part."""
    parts = {name: STAGES.get(name).makes for name in STAGES.trained()}
    return {name: made[0] for name, made in parts.items() if len(made) == 1}


def refuse_unloaded_stages(path: Path, plain: Mapping[str, Any]) -> None:
    """Raise UserError if the settings `plain`, in the file `path`, have fields of a stage that is not registered.

    The message names the modules that the settings name, because it is the user who decides whether to import them.
    """
    known = {field.name for field in fields(run_config_class())}
    unknown = sorted(name for name in plain if name not in known)
    modules = plain.get("plugins")
    if unknown and isinstance(modules, list) and modules:
        names = ",".join(str(module) for module in modules)[:200]
        raise UserError(
            f"{path} has the setting {unknown[0][:80]!r} of a plug-in's stage, which is not loaded: if you trust the "
            f"plug-in, add plugins=[{names}]"
        )
    if unknown:
        raise UserError(
            f"{path} has the setting {unknown[0][:80]!r}, which no stage here knows: install the plug-in that brings it"
            f"{broken_plugins_note()}"
        )
