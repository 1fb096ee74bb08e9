"""The base classes of stages: Stage, and TrainStage for those that train. CONTRIBUTING.md has an example."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from dvae.config.schema import RunConfig, TrainingConfig
from dvae.errors import UserError
from dvae.models.components import RunModels
from dvae.registry.stages.base import STAGES, DeclaredStage
from dvae.runs.folder import Run
from dvae.stages.train_stage import train_stage
from dvae.training.loop import TrainHooks
from dvae.training.train_task import TrainTask


class Stage(DeclaredStage):
    """A step of a run. It is built with the settings of the run, and holds nothing else."""

    def check(self, models: RunModels) -> None:
        """Raise UserError if the stage cannot work with the run's models, which are on the meta device.

        Called before anything of the run is written.
        """

    def describe(self, models: RunModels) -> str:
        """What the stage will do, in a few words for a dry run; empty if there is nothing to tell."""
        return ""

    @abstractmethod
    def run(self, run: Run) -> None:
        """Do the work, and enter it as finished (`Run.finish`).

        On a second call after the process was killed, go on from what was kept. Every rank is called if `all_ranks` is
        set, else rank 0 alone.
        """

    def run_part(self, run: Run, part: int, parts: int) -> None:
        """Do part number `part` (0 is the first) of `parts`, beside other processes; `run` publishes them together.

        Called only if `in_parts` is set.
        """
        raise NotImplementedError(f"stage {self.name!r} is not done in parts")

    def is_current(self, record: dict[str, Any]) -> bool:
        """Whether what was finished with this record still holds; otherwise the stage is run again."""
        return True


class TrainStage(Stage):
    """A stage that trains: its Config has a field `train_NAME: TrainingConfig`."""

    all_ranks = True
    parts: ClassVar[Mapping[str, str]]
    """What is saved of the averaged weights, as weights/PART.safetensors: part -> submodule of the trained module (""
    if it is the whole module)."""

    @property
    def training(self) -> TrainingConfig:
        """How it is trained."""
        return self.config.training(self.name)

    def trainings(self) -> list[str]:
        """The names of its trainings, in their order: one, of its own name, or several rounds NAME-32, NAME-16."""
        return [self.name]

    @abstractmethod
    def open_task(self, run: Run, name: str) -> TrainTask:
        """The task of the training `name`, with its modules as they are before the first step."""

    def hooks(self, run: Run, task: TrainTask) -> TrainHooks:
        """What is drawn and scored while the task is trained."""
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
    """The stage `name` of a run with these settings. Raises UserError if there is none."""
    stage = STAGES.get(name)(config)
    if not isinstance(stage, Stage):
        raise UserError(f"stage {name!r} of {type(stage).__module__} must derive from dvae.stages.base.Stage")
    return stage


def open_stages(config: RunConfig) -> list[Stage]:
    """The stages of a run, in their order."""
    return [open_stage(name, config) for name in STAGES.order(config.stages)]


def open_train_stage(name: str, config: RunConfig) -> TrainStage:
    """The stage `name`, which must be one that trains. Raises UserError if it is not."""
    stage = open_stage(name, config)
    if not isinstance(stage, TrainStage):
        raise UserError(f"the stage {name} does not train: name one of {', '.join(STAGES.trained())}")
    return stage
