"""Write checkpoints in the background, and find the newest intact one.

A checkpoint is either complete or absent: its folder is written under another name and renamed at the end.

checkpoints/STAGE/step-00001000/
    state.json                      TrainState: step, seconds, metric sums of all ranks, skipped steps
    MODULE/rank-00000.safetensors   rank 0's part of the module: weights, moments, averages (engine/fragments.py)
    hashes.json                     SHA-256 of every file above
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from threading import Thread
from types import TracebackType
from typing import Any

from dvae.errors import MachineError, printable_line
from dvae.training.metric_sums import MetricSums
from dvae.training.resilience import ranks
from dvae.utils import atomic_files
from dvae.utils.number_types import Count, Seconds
from dvae.utils.read import (
    JSON_LIMIT,
    DamagedFile,
    check,
    forbid_extra,
    parse_json,
    read_bytes,
    read_json,
    read_weights_header,
    require_regular,
)

log = logging.getLogger("dvae")
HASHES = "hashes.json"
STATE = "state.json"
NAME = re.compile(r"step-[0-9]{8,18}")
"""Name of a checkpoint's folder."""
WriteFiles = Callable[[Path], list[Path]]
"""write(folder) writes one rank's files into a folder, and returns their paths."""


class Checkpoints:
    """The checkpoints of one stage: `folder`/step-00001000/, ...

    A block `with checkpoints:` waits at its end until the save in progress is published. It also waits if the block
    ends with a MachineError, unless another rank is lost: then the save can never be completed.

    Args:
        folder: Folder of the stage's checkpoints.
        keep: Number of newest checkpoints to keep.
        keep_every: Checkpoints whose step is a multiple of this are never removed (0: none).
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0) -> None:
        self.folder = folder
        self.keep = keep
        self.keep_every = keep_every
        self._pending: tuple[int, Thread] | None = None
        self._fault: Exception | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Stopped is a MachineError too. After any other exception, such as KeyboardInterrupt, do not wait.
        if kind is None or (issubclass(kind, MachineError) and not issubclass(kind, ranks.PeerLost)):
            self.finish()

    def save(self, step: int, state: dict[str, Any], write: WriteFiles) -> None:
        """Start a checkpoint of `step`: `state` (JSON-ready) and the files of every rank's `write(folder)`.

        Every rank takes part. A thread writes the files, one checkpoint at a time. If it fails, the next call of
        `save`, `check` or `finish` raises the error.
        """
        self.finish()
        staging = ExitStack()
        try:
            # Rank 0 creates the temporary folder, and its `staging` renames it at the end of the thread. On the other
            # ranks `staging` stays empty.
            folder = ranks.on_rank_zero(lambda: staging.enter_context(atomic_files.new_folder(self._path(step))))
        except OSError as error:
            self._raise_write_error(step, error)
        thread = Thread(target=self._write, args=(step, state, write, folder, staging), daemon=True)
        self._pending = (step, thread)
        thread.start()

    def check(self) -> None:
        """Raise MachineError if the save in progress has failed. Does not wait."""
        if self._pending and not self._pending[1].is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait until the save in progress is published. Raises MachineError if it failed."""
        if self._pending is None:
            return
        step, thread = self._pending
        thread.join()
        fault, self._pending, self._fault = self._fault, None, None
        if fault:
            self._raise_write_error(step, fault)

    def _raise_write_error(self, step: int, error: Exception) -> None:
        """Raise an OSError of a save as a MachineError for the user, and any other error as it is."""
        if not isinstance(error, OSError):
            raise error
        raise MachineError(
            f"checkpoint of step {step} could not be written to {self.folder} ({error.strerror or error}); "
            "earlier checkpoints are intact: make room, then run the same command again"
        ) from None

    def _write(self, step: int, state: dict[str, Any], write: WriteFiles, folder: Path, staging: ExitStack) -> None:
        """Write this rank's files. Rank 0 also writes the state, and the hashes once all ranks have written.

        This runs in the background thread.
        """
        try:
            with staging:  # on rank 0, a clean exit publishes the folder and an exception removes it
                written = write(folder)
                if ranks.rank() == 0:
                    (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
                    written = [*written, folder / STATE]
                hashes = {str(path.relative_to(folder)): atomic_files.sha256(path) for path in written}
                for path in written:
                    atomic_files.sync(path)  # before the rename, or a power failure could leave a folder without data
                # The thread cannot use a collective: the main thread uses the process group at the same time.
                parts = ranks.gather_from_thread(f"{self.folder} {step}", hashes)
                if parts:
                    merged = {name: digest for part in parts for name, digest in part.items()}
                    (folder / HASHES).write_text(json.dumps(merged, indent=1), encoding="utf-8")
            if parts:  # only on rank 0, and only after the new checkpoint is published
                self._drop_old()
        except Exception as error:  # noqa: BLE001 # the main thread raises it again
            self._fault = error

    def _drop_old(self) -> None:
        """Remove all but the newest `keep` checkpoints and the multiples of `keep_every`."""
        for old in self._paths()[self.keep :]:
            if not self.keep_every or _step(old) % self.keep_every:
                _remove(old)

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Folder and state of the newest intact checkpoint, or None. Damaged ones are logged and skipped."""
        atomic_files.remove_leftovers(self.folder)
        for path in self._paths():
            try:
                return path, read_verified(path)
            except (DamagedFile, OSError) as error:
                log.warning("checkpoint %s is damaged (%s): skipping it", path, _damage_reason(path, error))
        return None

    def steps(self) -> list[int]:
        """Steps of all checkpoints in the folder, in increasing order. The checkpoints are not verified."""
        return sorted(_step(path) for path in self._paths())

    def verified_folder(self, step: int) -> Path:
        """The folder of the checkpoint of `step`. Raises MachineError if the checkpoint is damaged."""
        path = self._path(step)
        try:
            read_verified(path)
        except (DamagedFile, OSError) as error:
            reason = _damage_reason(path, error)
            raise MachineError(f"checkpoint {path} is damaged ({reason}): use another step of {self.steps()}") from None
        return path

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints after `step`. They are damaged, and the run is about to repeat their steps."""
        for path in self._paths():
            if _step(path) > step:
                _remove(path)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _paths(self) -> list[Path]:
        """Folders of all checkpoints, the newest first."""
        found = [path for path in self.folder.glob("step-*") if NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: (_step(path), path.name), reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _damage_reason(path: Path, error: Exception) -> str:
    """The reason why the checkpoint at `path` is damaged, in one line without the path."""
    return printable_line(error).removeprefix(f"{path}: ")


def _remove(path: Path) -> None:
    """Remove a checkpoint, or a file or link with its name. The target of a link is not removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _refuse_huge_file(path: Path) -> None:
    """Raise DamagedFile if a file is too large to be a part of a checkpoint.

    A damaged file may be sparse and claim a huge size, so that hashing it would take hours.
    """
    if path.suffix == ".safetensors":
        read_weights_header(path)  # raises DamagedFile unless the file has the size that its header states
    elif require_regular(path).st_size > JSON_LIMIT:
        raise DamagedFile(path, f"has more than the {JSON_LIMIT} bytes that such a file may have")


@forbid_extra
@dataclass
class SavedState:
    """Contents of state.json: the TrainState of rank 0, and the metric sums of the other ranks."""

    step: Count
    seconds: Seconds = 0.0
    window_seconds: Seconds = 0.0
    skipped: Count = 0
    sums: MetricSums = field(default_factory=dict)
    others: list[MetricSums] = field(default_factory=list)


def read_verified(path: Path) -> dict[str, Any]:
    """Verify the checkpoint in the folder `path`, and return its state.

    Raises DamagedFile or OSError unless the folder holds exactly the files that were saved: if a file is missing, does
    not match its hash, is not listed in hashes.json or lies outside the folder, or if a value has the wrong type.
    """
    if path.is_symlink() or not path.is_dir():
        raise DamagedFile(path, "is not a folder")
    hashes = read_json(path / HASHES, dict[str, str])
    root, listed = os.path.realpath(path), {HASHES}
    for name, expected in hashes.items():
        # hashes.json is not trusted: it must not make us read files outside the checkpoint, directly or by a link.
        place = PurePosixPath(name)
        if not name.isprintable():
            raise DamagedFile(path / HASHES, f"names {name[:80]!r}, which is not a valid file name")
        inside = Path(os.path.realpath(path / name)).is_relative_to(root)
        if place.is_absolute() or ".." in place.parts or not inside:
            raise DamagedFile(path / HASHES, f"names {name[:80]!r}, which lies outside the checkpoint")
        _refuse_huge_file(path / name)
        if atomic_files.sha256(path / name) != expected:
            raise DamagedFile(path, f"{name[:80]} does not match its hash")
        listed.add(str(place))
    for item in sorted(path.rglob("*")):
        name = item.relative_to(path).as_posix()
        if name not in listed and (item.is_symlink() or not item.is_dir()):
            raise DamagedFile(path, f"{name[:80]!r} is not listed in {HASHES}")
    if STATE not in listed:
        raise DamagedFile(path, f"{STATE} is not listed in {HASHES}")
    state: dict[str, Any] = parse_json(read_bytes(path / STATE, JSON_LIMIT), path / STATE)
    if check(SavedState, state, path / STATE).step != _step(path):
        raise DamagedFile(path / STATE, f"is the state of step {state['step']}")
    return state
