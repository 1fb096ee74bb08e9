"""The base classes of stages: Stage, and TrainStage for stages that train. CONTRIBUTING.md has an example."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from dvae.config.schema import RunConfig, TrainingConfig
from dvae.config.stage_names import training_field
from dvae.errors import UserError
from dvae.models.components import RunModels
from dvae.registry.core import NAME
from dvae.registry.stages.base import STAGES, DeclaredStage
from dvae.runs.folder import Run
from dvae.stages.train_stage import train_stage
from dvae.training.loop import TrainHooks
from dvae.training.train_task import TrainTask

RESERVED_PARTS = ("encoder", "prior", "denoiser", "classifier", "teacher", "posteriors")
"""Names of weights that the stages of dvae write."""


class Stage(DeclaredStage):
    """A step of a run. An instance holds only the settings of the run."""

    def check(self, models: RunModels) -> None:
        """Raise UserError if the stage cannot work with the run's models.

        The models are on the meta device. This is called before the run writes anything.
        """

    def describe(self, models: RunModels) -> str:
        """Return a short description of the stage's work, for a dry run. It may be empty."""
        return ""

    @abstractmethod
    def run(self, run: Run) -> None:
        """Do the work, then record the stage as finished (`Run.finish`).

        If an earlier process was killed in this stage, continue from the files that it kept. If `all_ranks` is set,
        every rank calls this; otherwise only rank 0 does.
        """

    def run_part(self, run: Run, part: int, parts: int) -> None:
        """Do part number `part` (from 0) of `parts`. Other processes may do other parts at the same time.

        A later call of `run` publishes all parts together. This is called only if `in_parts` is set.
        """
        raise NotImplementedError(f"stage {self.name!r} is not done in parts")

    def is_current(self, record: dict[str, Any]) -> bool:
        """Return whether the finished work with this record is still valid. If not, the stage runs again."""
        return True


class TrainStage(Stage):
    """A stage that trains. Its Config has a field `train_NAME: TrainingConfig`, where NAME is the stage's name."""

    all_ranks = True
    parts: ClassVar[Mapping[str, str]] = {}
    """The averaged weights that are saved as weights/PART.safetensors: part -> submodule of the trained module ("": the
    whole module)."""

    @property
    def training(self) -> TrainingConfig:
        """The training settings of the stage."""
        return self.config.training(self.name)

    def trainings(self) -> list[str]:
        """Return the names of the stage's trainings, in their order.

        There is one training with the name of the stage, or one for each round: NAME-32, NAME-16, ...
        """
        return [self.name]

    @abstractmethod
    def open_task(self, run: Run, name: str) -> TrainTask:
        """Return the task of the training `name`. Its modules are in the state before the first step."""

    def hooks(self, run: Run, task: TrainTask) -> TrainHooks:
        """Return the hooks that draw previews and compute scores while the task is trained."""
        return TrainHooks()

    def run(self, run: Run) -> None:
        task = self.open_task(run, self.name)
        train_stage(run, self.config, task, self.parts, self.hooks(run, task))

    def describe(self, models: RunModels) -> str:
        modules = models.trained_parts()
        parameters = sum(p.numel() for part in self.makes if part in modules for p in modules[part].parameters())
        counted = f"{parameters / 1e6:.1f}M parameters, " if parameters else ""
        return f"{counted}{self.training.steps} steps of {self.training.batch} images"


def open_stage(name: str, config: RunConfig) -> Stage:
    """Return the stage `name` of a run with these settings. Raises UserError if there is no such stage."""
    stage = STAGES.get(name)(config)
    if not isinstance(stage, Stage):
        raise UserError(f"stage {name!r} of {type(stage).__module__} must derive from dvae.stages.base.Stage")
    if isinstance(stage, TrainStage):
        check_parts(stage)
    return stage


def check_parts(stage: TrainStage) -> None:
    """Raise UserError if what a stage says of the parts that it saves is wrong.

    A part of a run's models can only be saved by a stage that has it in `makes`; weights of others would be lost.
    """
    if not hasattr(stage.config, training_field(stage.name)):
        raise UserError(
            f"stage {stage.name!r}: its Config needs the field {training_field(stage.name)}: TrainingConfig"
        )
    parts = getattr(stage, "parts", None)
    if not isinstance(parts, Mapping) or not all(isinstance(part, str) and NAME.fullmatch(part) for part in parts):
        raise UserError(f"stage {stage.name!r}: parts={parts!r}: write a mapping, such as {{'{stage.name}': ''}}")
    foreign = [part for part in parts if part in RESERVED_PARTS and part not in stage.makes]
    if foreign:
        raise UserError(f"stage {stage.name!r}: parts would overwrite the weights of {foreign[0]!r}: use another name")


def open_stages(config: RunConfig) -> list[Stage]:
    """Return the stages of a run, in their order."""
    return [open_stage(name, config) for name in STAGES.order(config.stages)]


def open_train_stage(name: str, config: RunConfig) -> TrainStage:
    """Return the stage `name`. Raises UserError if it does not train."""
    stage = open_stage(name, config)
    if not isinstance(stage, TrainStage):
        raise UserError(f"the stage {name} does not train: name one of {', '.join(STAGES.trained())}")
    return stage
