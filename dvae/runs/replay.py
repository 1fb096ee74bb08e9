"""Replay a recorded non-finite step in one process, with the same weights, samples and random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING
from torch import nn

from dvae.config.schema import RunConfig, TrainingConfig
from dvae.config.stage_names import stage_of, training_field
from dvae.data.loading.loader import Batch
from dvae.errors import UserError, fold
from dvae.models import components
from dvae.runs.folder import Run
from dvae.stages.base import open_train_stage
from dvae.training.batches import open_loader
from dvae.training.engine.deepspeed_engine import Engine, start_distributed
from dvae.training.loop import accumulate_gradients
from dvae.training.resilience import nonfinite
from dvae.training.train_task import TrainTask
from dvae.utils.read import DamagedFile
from dvae.utils.weights import fit_weights, load_weights, part_of


@dataclass(kw_only=True, slots=True)
class ReplayConfig:
    """Settings of tools/replay.py."""

    bundle: str = MISSING
    """A folder nonfinite-STAGE-STEP in a run folder."""
    shards: str = ""
    """Location of the run's shards. It is needed if they were moved, or if they are at a URL or come from a command
    (empty: the location in the run's settings)."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import. They register components."""


ConfigStore.instance().store(name="replay_schema", node=ReplayConfig, provider="dvae")


@dataclass(frozen=True)
class ReplayResult:
    """A step as it was recorded, and as it is in the replay.

    Both have the entries of `nonfinite.describe_step`, such as "figures" and "gradient_norms". Values are numbers, or
    "nan", "inf", "-inf".
    """

    recorded: dict[str, Any]
    """The step as it was recorded."""
    now: dict[str, Any]
    """The step in the replay."""
    first_nonfinite_layer: str
    """The first layer in the replay whose output is not finite although its input is. Empty if there is none."""

    @property
    def summary(self) -> str:
        """One line that says whether the same values are not finite again."""
        before, now = (
            {name for names in step["not_finite"].values() for name in names} for step in (self.recorded, self.now)
        )
        if before == now:
            return f"reproduced: the same {len(now)} values are not finite"
        if not now:
            return "not reproduced: every value is finite; another device, other libraries, or a fault of the machine"
        only_before, only_now = ", ".join(sorted(before - now)), ", ".join(sorted(now - before))
        return (
            f"reproduced in part: {len(before & now)} of {len(before)} values are not finite again; "
            f"then only: {only_before or 'none'}; now only: {only_now or 'none'}"
        )


def replay(folder: str, shards: str = "") -> ReplayResult:
    """Compute the gradients of the step in the replay bundle `folder` again. `shards` is as in ReplayConfig.

    The micro-batches of all ranks are processed one after the other, in the order of the batch. Raises UserError for a
    damaged bundle, and if the bundle does not belong to the run in whose folder it is.
    """
    path = Path(folder)
    try:
        record = nonfinite.read_record(path)
    except (OSError, DamagedFile) as error:
        raise UserError(
            f"bundle={path} is no replay bundle ({fold(error)}): name a folder nonfinite-STAGE-STEP of a run"
        ) from None
    start_distributed()
    run = Run(path.absolute().parent)
    config = run.config()
    # The settings may come from an untrusted source. Building on the meta device checks them without using much memory.
    components.build_models_on_meta(config)
    if shards:
        config.data.shards = shards
    check_same_run(config, record, path)
    training = merge_ranks(config, record)
    task = open_train_stage(stage_of(record["stage"]), config).open_task(run, record["stage"])
    batches = recorded_batches(config, training, task, record, path)
    engines = recorded_engines(task, record["step"], path)
    with record_nonfinite_layers(engines) as layers:
        metrics = accumulate_gradients(task, engines, batches, record["step"])
    now = nonfinite.describe_step([metrics], engines)
    for engine in engines.values():
        engine.close()
    return ReplayResult(record, now, next(iter(layers), ""))


def check_same_run(config: RunConfig, record: dict[str, Any], path: Path) -> None:
    """Raise UserError if the run has no such training, or if its batch size or number of steps does not match."""
    name = record["stage"]
    stage, training = open_train_stage(stage_of(name), config), config.training(name)
    if name not in stage.trainings() or len(record["samples"]) != training.batch or record["step"] > training.steps:
        raise UserError(
            f"bundle={path}: step {record['step']} of {name} with {len(record['samples'])} samples does not belong to "
            "the run that contains it: leave the bundle in the run folder where it was written"
        )


def merge_ranks(config: RunConfig, record: dict[str, Any]) -> TrainingConfig:
    """Change the stage's settings in `config`, so that one process computes the micro-batches of all ranks.

    Returns the new training settings.
    """
    training = config.training(record["stage"])
    parts = record["world_size"] * record["micro_batches"]
    training = replace(training, zero_stage=0, offload=False, micro_batches=parts)
    setattr(config, training_field(record["stage"]), training)
    return training


def recorded_batches(
    config: RunConfig, training: TrainingConfig, task: TrainTask, record: dict[str, Any], path: Path
) -> list[Batch]:
    """Return the step's micro-batches. Raises UserError if their samples differ from the recorded ones."""
    with open_loader(config, training, task.name, images=task.needs_images, all_ranks=True) as data:
        batches = data.step((record["step"] - 1) * training.batch)
    for name, values in (
        ("samples", [batch.keys for batch in batches]),
        ("indices", [batch.indices for batch in batches]),
    ):
        if torch.cat(values).tolist() != record[name]:
            raise UserError(f"bundle={path}: its {name} differ from the run's data: were the shards replaced?")
    return batches


def recorded_engines(task: TrainTask, step: int, path: Path) -> dict[str, Engine]:
    """Return an engine for each module that `step` trained, with the recorded weights."""
    weights = load_weights(path / nonfinite.WEIGHTS)
    engines = {}
    for name, module in task.modules().items():
        if task.trains(name, step):
            fit_weights(module, part_of(weights, name), str(path / nonfinite.WEIGHTS))
            engines[name] = Engine(module, task.module_config(name))
    return engines


@contextmanager
def record_nonfinite_layers(engines: Mapping[str, Engine]) -> Iterator[list[str]]:
    """Record the layers whose output is not finite although their input is, while the block runs.

    Yields the list of their names, in the order of the calls.
    """
    found: list[str] = []
    hooks = []

    def check_layer(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not all_finite(output) and all_finite(inputs):
                found.append(name)

        return hook

    for name, engine in engines.items():
        for layer, module in engine.module.named_modules():
            if not list(module.children()):
                hooks.append(module.register_forward_hook(check_layer(f"{name}.{layer}")))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def all_finite(values: Any) -> bool:
    """Return whether all tensors among `values` are finite."""
    values = values if isinstance(values, tuple | list) else (values,)
    return all(bool(value.isfinite().all()) for value in values if isinstance(value, torch.Tensor))
