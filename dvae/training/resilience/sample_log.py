"""The loader of a stage on several ranks, and the record of the samples that it has handed out."""

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
"""Columns of the record that hold a list."""
SAMPLES_LIMIT = 2**33
"""Bytes of the record, at most: some million steps of 512 images."""


def samples_file(run: Path, stage: str) -> Path:
    """Where the samples of a stage are recorded."""
    return run / f"samples-{stage}.jsonl"


def gather_samples(batches: list[Batch]) -> dict[str, list[int]]:
    """ "samples" (global numbers) and "indices" (of the data set) of all ranks' micro-batches, by sample number.

    Every rank takes part.
    """
    per_rank = ranks.all_gather([(batch.keys.tolist(), batch.indices.tolist()) for batch in batches])
    parts = sorted(part for rank in per_rank for part in rank)
    return {
        "samples": [key for keys, _ in parts for key in keys],
        "indices": [index for _, indices in parts for index in indices],
    }


class SynchronizedLoader:
    """A loader on every rank, which all ranks call alike.

    Damaged images that a rank has met are made known to all every `log_every` steps, so that all pass over the same
    ones, and all stop at once where there are too many. With `log_samples` each step's samples are written down as they
    are handed out: a row {"stage", "step", "samples": global numbers, "indices": of the data set} for all ranks.
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
        """This rank's micro-batches of the global step that begins at global sample number `sample`."""
        batches = self._loader.step(sample)
        step = sample // self._training.batch + 1
        if self._log:
            self._log_samples(self._log, step, batches)
        if self._shards and (step % self._training.log_every == 0 or step == self._training.steps):
            self._share_damage(self._shards)
        return batches

    def _log_samples(self, log: MetricsLog, step: int, batches: list[Batch]) -> None:
        samples = gather_samples(batches)
        if ranks.rank():
            return
        if step != self._next:  # where training resumes: what was handed out later is handed out again
            log.rewind(self._stage, step - 1)
        log.append({"stage": self._stage, "step": step, **samples})
        self._next = step + 1

    def _share_damage(self, shards: Shards) -> None:
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
