"""Skip steps with non-finite gradients, and save them as replay bundles for tools/replay.py.

A replay bundle is the folder run/nonfinite-<stage>-<step>/. It holds weights.safetensors, the weights of the modules at
that step, and record.json, the samples and metrics of the step. Non-finite numbers are written as "nan", "inf", "-inf".
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeAlias

import torch
from pydantic import Field
from torch import nn
from typing_extensions import TypedDict

from dvae.config.stage_names import stage_of, training_field
from dvae.data.loading.loader import Batch
from dvae.errors import MachineError
from dvae.registry.stages.base import STAGES
from dvae.training.metric_sums import MetricSums, add_metric_sums, metric_means
from dvae.training.resilience import ranks
from dvae.training.resilience.sample_log import gather_samples
from dvae.training.train_task import TrainTask
from dvae.utils import atomic_files
from dvae.utils.number_types import Number, Positive
from dvae.utils.read import DamagedFile, read_json
from dvae.utils.weights import save_weights

log = logging.getLogger("dvae")
MAX_SAVED = 3
"""Largest number of replay bundles of a stage. Further skipped steps are only counted."""
RECORD, WEIGHTS = "record.json", "weights.safetensors"

WrittenNumber: TypeAlias = Number | Literal["nan", "inf", "-inf"]
"""A number in a record; see `to_json_number`."""


class TrainedEngine(Protocol):
    """The part of an engine's interface that a replay bundle needs."""

    module: nn.Module

    def weights(self) -> dict[str, torch.Tensor]: ...

    def gradient_norms(self) -> dict[str, float]: ...


class NonFiniteStep(MachineError):
    """Raised if more steps are non-finite than the config allows. A retry would compute the same steps again."""

    retryable = False


def record_nonfinite_step(
    task: TrainTask,
    engines: Mapping[str, TrainedEngine],
    batches: list[Batch],
    metrics: list[MetricSums],
    step: int,
    skipped: int,
    run: Path,
) -> None:
    """Save a replay bundle of `step`, and log a warning.

    Every rank takes part. Call it before the engines step, because a step releases the gradients. Raises NonFiniteStep
    on all ranks if `skipped`, the number of skipped steps including this one, exceeds TrainingConfig.nonfinite_skips.
    """
    allowed = task.config.nonfinite_skips
    where = "not saved"
    if skipped <= MAX_SAVED:
        path = run / f"nonfinite-{task.name}-{step:08d}"
        save_replay_bundle(path, task, engines, batches, metrics, step)
        where = f"python tools/replay.py bundle={path}"
    what = f"{task.name} step {step}: a gradient is not finite; the step was skipped"
    if skipped > allowed:
        raise NonFiniteStep(
            f"{what}{f' like {allowed} before' if allowed else ''}, the last checkpoint is good: look at the step "
            f"({where}), lower the learning rate, or raise {training_field(task.name)}.nonfinite_skips={allowed}"
        )
    if ranks.rank() == 0:
        log.warning("%s (%d of %d allowed, %s)", what, skipped, allowed, where)


def save_replay_bundle(
    path: Path,
    task: TrainTask,
    engines: Mapping[str, TrainedEngine],
    batches: list[Batch],
    metrics: list[MetricSums],
    step: int,
) -> None:
    """Write the replay bundle of `step` to the folder `path`, completely or not at all. Every rank takes part."""
    samples = gather_samples(batches)
    record = {
        "stage": task.name,
        "step": step,
        "seed": task.seed,
        "world_size": ranks.world_size(),
        "micro_batches": len(batches),
        **samples,
    } | describe_step(ranks.all_gather(metrics), engines)
    weights = {f"{name}.{key}": value for name, engine in engines.items() for key, value in engine.weights().items()}

    def write() -> None:
        with atomic_files.new_folder(path) as folder:
            atomic_files.write_json(folder / RECORD, record)
            save_weights(folder / WEIGHTS, weights)

    ranks.on_rank_zero(write)


def describe_step(metrics: list[list[MetricSums]], engines: Mapping[str, TrainedEngine]) -> dict[str, Any]:
    """Build the part of a record that a replay compares: metrics, gradient norms by layer, and the non-finite ones.

    `metrics` holds, for each rank, the metrics of its micro-batches. Every rank takes part.
    """
    sums = add_metric_sums(part for rank in metrics for part in rank)
    means = metric_means(dict(sorted(sums.items())))
    norms = {
        f"{name}.{layer}": norm for name, engine in engines.items() for layer, norm in engine.gradient_norms().items()
    }
    return {
        "figures": {name: to_json_number(value) for name, value in means.items()},
        "gradient_norms": {name: to_json_number(value) for name, value in norms.items()},
        "not_finite": {
            "figures": [name for name, value in means.items() if not math.isfinite(value)],
            "gradient_norms": [name for name, value in norms.items() if not math.isfinite(value)],
        },
    }


def to_json_number(value: float) -> float | str:
    """Convert a number for JSON, which has no NaN and infinity: they become strings, which float() parses."""
    return value if math.isfinite(value) else str(value)


class ReplayRecord(TypedDict):
    """Contents of record.json: a step, its samples, and its metrics and gradient norms."""

    stage: Annotated[str, Field(pattern="^[a-z0-9_]+(-[0-9]{1,9})?$")]
    step: Positive
    seed: int
    world_size: Positive
    micro_batches: Positive
    """Micro-batches of each rank."""
    samples: Annotated[list[int], Field(min_length=1)]
    indices: list[int]
    figures: dict[str, WrittenNumber]
    gradient_norms: dict[str, WrittenNumber]
    not_finite: dict[str, list[str]]


def read_record(path: Path) -> dict[str, Any]:
    """Read the record of a replay bundle. Raises OSError if there is none, and DamagedFile if it is damaged."""
    record: dict[str, Any] = dict(read_json(path / RECORD, ReplayRecord))
    parts, samples = record["world_size"] * record["micro_batches"], len(record["samples"])
    if stage_of(record["stage"]) not in STAGES.trained():
        raise DamagedFile(path / RECORD, f"stage: {record['stage']!r} is not a training stage")
    if samples % parts or samples != len(record["indices"]):
        raise DamagedFile(path / RECORD, f"holds {samples} samples, which do not divide into {parts} micro-batches")
    return record


class BufferBackup:
    """A copy of the modules' buffers, such as running statistics.

    A forward pass changes them, so skipping the optimizer's step is not enough to undo a step.
    """

    def __init__(self, engines: Mapping[str, TrainedEngine]) -> None:
        self._buffers = [buffer for engine in engines.values() for buffer in engine.module.buffers()]
        self._values = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def restore(self) -> None:
        """Set the buffers to the values that they had when this object was created."""
        for buffer, value in zip(self._buffers, self._values, strict=True):
            buffer.copy_(value)
