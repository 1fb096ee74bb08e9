"""The data loader of a stage on several ranks, and the log of the samples that it has returned."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from dvae.config.schema import TrainingConfig
from dvae.data.loading.loader import Batch, Loader
from dvae.data.loading.streams import StreamLoader
from dvae.data.shards.reader import Shards
from dvae.tracking.metrics_log import MetricsLog
from dvae.training.resilience import ranks
from dvae.training.resilience.damage_record import record_damage

LIST_COLUMNS = ("samples", "indices")
"""Columns of the log that hold a list."""
SAMPLES_LIMIT = 2**33
"""Largest accepted size of the log, in bytes: about a million steps of 512 images."""


def samples_file(run: Path, stage: str) -> Path:
    """Path of the log of a stage's samples."""
    return run / f"samples-{stage}.jsonl"


def gather_samples(batches: list[Batch]) -> dict[str, list[int]]:
    """Collect the samples of all ranks' micro-batches, in the order of their numbers. Every rank takes part.

    Returns "samples", the global sample numbers, and "indices", the indices of the images in the data set.
    """
    per_rank = ranks.all_gather([(batch.keys.tolist(), batch.indices.tolist()) for batch in batches])
    parts = sorted(part for rank in per_rank for part in rank)
    return {
        "samples": [key for keys, _ in parts for key in keys],
        "indices": [index for _, indices in parts for index in indices],
    }


class SynchronizedLoader:
    """A data loader that shares damaged images between ranks, and can log the samples of each step.

    All ranks must call `step` with the same arguments. Every `log_every` steps the ranks exchange the damaged images
    that they found. So all ranks skip the same images, and all stop together if there are too many.

    With `log_samples`, each step appends a row to the log: {"stage", "step", "samples": global sample numbers,
    "indices": indices in the data set}, for the batch of all ranks.
    """

    def __init__(
        self,
        loader: Loader | StreamLoader,
        shards: Shards | None,
        training: TrainingConfig,
        stage: str,
        run: Path,
        log_samples: bool,
    ) -> None:
        self._loader, self._shards, self._training, self._stage, self._run = loader, shards, training, stage, run
        self._log = MetricsLog(samples_file(run, stage), LIST_COLUMNS, SAMPLES_LIMIT) if log_samples else None
        self._next: int | None = None
        self._known_damaged: set[int] = set(shards.damaged) if shards else set()

    def step(self, sample: int) -> list[Batch]:
        """Return this rank's micro-batches of the step whose batch starts at global sample number `sample`."""
        batches = self._loader.step(sample)
        step = sample // self._training.batch + 1
        if self._log:
            self._log_samples(self._log, step, batches)
        if self._shards and (step % self._training.log_every == 0 or step == self._training.steps):
            self._share_damage(self._shards)
        return batches

    def _log_samples(self, log: MetricsLog, step: int, batches: list[Batch]) -> None:
        """Append the samples of all ranks in `step` to the log. Rank 0 writes."""
        samples = gather_samples(batches)
        if ranks.rank():
            return
        if step != self._next:  # training resumes here and repeats the steps that follow, so remove their rows
            log.rewind(self._stage, step - 1)
        log.append({"stage": self._stage, "step": step, **samples})
        self._next = step + 1

    def _share_damage(self, shards: Shards) -> None:
        """Exchange newly found damaged images between ranks, and add them to the run's record."""
        new = {index: reason for index, reason in dict(shards.damaged).items() if index not in self._known_damaged}
        found = {index: reason for part in ranks.all_gather(new) for index, reason in part.items()}
        if found:
            shards.add_damaged(found)
            self._known_damaged |= found.keys()
            ranks.on_rank_zero(record_damage, self._run, shards)

    def close(self) -> None:
        self._loader.close()

    def __enter__(self) -> SynchronizedLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
