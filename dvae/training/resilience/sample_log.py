"""What a stage is fed: its loader, and the records of which samples it has seen and which images were damaged."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from dvae.config.schema import TrainingConfig
from dvae.data.loading.loader import Batch, Loader
from dvae.data.loading.streams import StreamLoader
from dvae.data.shards.reader import Shards
from dvae.errors import MachineError, fold
from dvae.tracking.metrics_log import MetricsLog
from dvae.training.resilience import ranks
from dvae.utils import atomic_files
from dvae.utils.read import DamagedFile, read_json

DAMAGED = "damaged.json"
"""In the run folder: images that were found damaged, by split: index -> file, key and reason."""
LISTS = ("samples", "indices")
"""Lists in a row of the record of samples."""
SAMPLES_LIMIT = 2**33
"""Bytes of that record, at most: some million steps of 512 images."""
LONGEST = 1000
"""Characters of a reason that are kept."""


def samples_file(run: Path, stage: str) -> Path:
    """Where the samples of a stage are recorded."""
    return run / f"samples-{stage}.jsonl"


class SynchronizedLoader:
    """A loader of which every rank has one: the same calls on all of them.

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
        self._log = MetricsLog(samples_file(run, stage), LISTS, SAMPLES_LIMIT) if log_samples else None
        self._next: int | None = None
        self._shared: set[int] = set(shards.damaged) if shards else set()

    def step(self, sample: int) -> list[Batch]:
        """This rank's micro-batches of the global step that begins at global sample number `sample`."""
        batches = self._loader.step(sample)
        step = sample // self._training.batch + 1
        if self._log:
            self._write(self._log, step, batches)
        if self._shards and (step % self._training.log_every == 0 or step == self._training.steps):
            self._share(self._shards)
        return batches

    def _write(self, log: MetricsLog, step: int, batches: list[Batch]) -> None:
        seen = ranks.all_gather([(batch.keys.tolist(), batch.indices.tolist()) for batch in batches])
        if ranks.rank():
            return
        if step != self._next:  # where training resumes: what was handed out later is handed out again
            log.rewind(self._stage, step - 1)
        parts = sorted(part for rank in seen for part in rank)  # in the order of the sample numbers
        row = {
            "samples": [key for keys, _ in parts for key in keys],
            "indices": [index for _, indices in parts for index in indices],
        }
        log.append({"stage": self._stage, "step": step, **row})
        self._next = step + 1

    def _share(self, shards: Shards) -> None:
        mine = {index: why for index, why in dict(shards.damaged).items() if index not in self._shared}
        found = {index: why for part in ranks.all_gather(mine) for index, why in part.items()}
        if found:
            shards.add_damaged(found)
            self._shared |= found.keys()
            ranks.on_rank_zero(record_damage, self._run, shards)

    def close(self) -> None:
        self._loader.close()

    def __enter__(self) -> SynchronizedLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_damaged(run: Path, split: str) -> dict[int, str]:
    """Images of a split that the run has found damaged so far: index -> file, key and reason."""
    return _record_of(run).get(split, {})


def _record_of(run: Path) -> dict[str, dict[int, str]]:
    """The run's record, by split. Raises MachineError if it cannot be read."""
    path = run / DAMAGED
    try:
        found: dict[str, dict[int, str]] = read_json(path, dict[str, dict[int, str]])
    except FileNotFoundError:
        return {}
    except (DamagedFile, OSError) as error:
        reason = error.reason if isinstance(error, DamagedFile) else fold(error)
        raise MachineError(f"{path} cannot be read ({reason}): remove it, what is damaged is found again") from None
    return {split: {index: why[:LONGEST] for index, why in known.items()} for split, known in found.items()}


def record_damage(run: Path, shards: Shards) -> None:
    """Add what `shards` knows to be damaged to the run's record; on rank 0 alone."""
    known = load_damaged(run, shards.split)
    if shards.damaged.keys() <= known.keys():
        return
    found = known | dict(shards.damaged)
    whole = _record_of(run) | {shards.split: dict(sorted(found.items()))}
    atomic_files.write_json(
        run / DAMAGED, {split: {str(i): why for i, why in one.items()} for split, one in whole.items()}
    )
