"""Stages: the steps of a run, such as training the encoder. Each is a file in dvae/stages/, or in a package of yours.

Here is what composing a run's settings must know of a stage; what a stage does is in dvae/stages/base.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig

from dvae.config.schema import RunConfig, TrainingConfig, extended_run_config
from dvae.config.stage_names import TRAINING_PREFIX
from dvae.errors import UserError, suggest
from dvae.registry.core import ComponentConfig, Registry


@dataclass(kw_only=True, slots=True)
class StageConfig(ComponentConfig):
    """Base of the nested Config of a stage: the fields that the stage adds to the settings of every run.

    They stand at the top level, beside `seed` and `refiner`. A field `train_NAME: TrainingConfig`, for the stage NAME,
    says how it is trained. A field of settings of its own, as `NAME: MyConfig`, is a dataclass too.
    """


C = TypeVar("C", bound=StageConfig)


class DeclaredStage(ABC):
    """What a stage says of itself. Stages derive from dvae.stages.base.Stage, which derives from this."""

    Config: type[StageConfig] = StageConfig
    after: tuple[str, ...] = ()
    """Stages that run before this one if a run has both."""
    before: tuple[str, ...] = ()
    """Stages that run after this one if a run has both."""
    makes: tuple[str, ...] = ()
    """The parts of a run's models whose weights it writes: encoder, prior, denoiser, classifier."""
    all_ranks = False
    """Whether every rank takes part. Otherwise rank 0 runs it while the others wait."""
    needs_gpus = True
    """Whether it has use for a GPU; if not, its own job goes to launcher.cpu_partition."""
    own_job = False
    """Whether, on SLURM with launcher.chain=true, it gets a job of its own, of one task."""
    in_parts = False
    """Whether several jobs can do it together (Stage.run_part)."""
    takes_streams = False
    """Whether it works with an endless source, which has no shards and no held-out images."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @property
    def name(self) -> str:
        return STAGES.name_of(self)

    def check_settings(self) -> None:  # noqa: B027 most stages have nothing to check
        """Raise UserError if the settings of a run that has this stage cannot work. Called whenever they are read."""

    @abstractmethod
    def run(self, run: Any) -> None:
        """Do the work in a run's folder, a dvae.runs.folder.Run."""


class StageRegistry(Registry[DeclaredStage]):
    """The stages, with their order and the fields that they add to a run's settings."""

    chosen = False

    def check_component(self, name: object, cls: Any) -> DictConfig:
        """As of every registry. Raises TypeError also for a field that a run, or another stage, has already."""
        node = super().check_component(name, cls)
        taken = {field.name: "every run" for field in fields(RunConfig)}
        for other, theirs in self._classes.items():
            if other != name:
                taken |= dict.fromkeys(stage_fields(theirs), f"the stage {other!r}")
        for field, kind in stage_fields(cls).items():
            if field in taken:
                raise TypeError(f"stage {name!r}: Config.{field} is a field of {taken[field]}: use another name")
            if field.startswith(TRAINING_PREFIX) and (field, kind) != (f"{TRAINING_PREFIX}{name}", TrainingConfig):
                raise TypeError(f"stage {name!r}: Config.{field}: write {TRAINING_PREFIX}{name}: TrainingConfig")
        return node

    def order(self, of: Collection[str] | None = None) -> list[str]:
        """The stages `of`, or all, in the order in which they run: by `after` and `before`, else by name.

        Raises UserError for a stage that is not registered, and for stages of which each runs before the other.
        """
        names = self.names()
        for wrong in (name for name in of or () if name not in names):
            raise UserError(f"unknown stage {wrong!r}: {suggest(wrong, self.order())}")
        earlier: dict[str, set[str]] = {name: set(self.get(name).after) for name in names}
        for name in names:
            for later in self.get(name).before:
                earlier.get(later, set()).add(name)
        found: list[str] = []
        while left := [name for name in names if name not in found]:
            free = [name for name in left if earlier[name].isdisjoint(left)]
            if not free:
                raise UserError(f"stages {', '.join(left)}: each is declared to run before another one of them")
            found.append(free[0])
        return [name for name in found if of is None or name in of]

    def trained(self) -> list[str]:
        """The stages that train, in their order."""
        return [name for name in self.order() if f"{TRAINING_PREFIX}{name}" in stage_fields(self.get(name))]


STAGES = StageRegistry("stage", "dvae.stages", DeclaredStage)


def stage_fields(stage: type[DeclaredStage]) -> dict[str, Any]:
    """The fields that a stage adds to the settings of a run, and their types."""
    types = get_type_hints(stage.Config)
    return {field: types[field] for field in _own_fields(stage.Config)}


def _own_fields(config: type[StageConfig]) -> list[str]:
    return [field.name for field in fields(config) if field.name != "name"]


def settings_of(config: RunConfig, kind: type[C]) -> C:
    """The fields of `config` that a stage has added, as that stage's own Config."""
    values: dict[str, Any] = {field: getattr(config, field) for field in _own_fields(kind)}
    return kind(**values)


def with_settings(config: RunConfig, settings: StageConfig) -> RunConfig:
    """A copy of `config` with other values of the fields that a stage has added."""
    changed: dict[str, Any] = {field: getattr(settings, field) for field in _own_fields(type(settings))}
    return replace(config, **changed)


def run_config_class() -> type[RunConfig]:
    """The class of a run's settings: RunConfig, and the fields of all stages that are registered."""
    return _run_config_class(tuple(STAGES.get(name) for name in STAGES.order()))


@lru_cache(maxsize=8)
def _run_config_class(stages: tuple[type[DeclaredStage], ...]) -> type[RunConfig]:
    added = [(field, stage_fields(stage)[field.name]) for stage in stages for field in fields(stage.Config)
             if field.name != "name"]  # fmt: skip
    return extended_run_config(added)


def training_fields() -> tuple[str, ...]:
    """The fields of a run's settings that hold the settings of a training, in the order of the stages."""
    return tuple(f"{TRAINING_PREFIX}{name}" for name in STAGES.trained())


def exported_parts() -> dict[str, str]:
    """Each stage that trains one part of a run's models, and that part."""
    parts = {name: STAGES.get(name).makes for name in STAGES.trained()}
    return {name: made[0] for name, made in parts.items() if len(made) == 1}
