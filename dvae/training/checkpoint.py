"""Checkpoints: complete or absent, hashed, written in the background, newest good one first."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

from dvae import files
from dvae.errors import MachineError
from dvae.training import ranks

log = logging.getLogger("dvae")
HASHES = "hashes.json"
STATE = "state.json"
Write = Callable[[Path], list[Path]]
"""Writes one rank's files into a folder, and says which they are."""


class Checkpoints:
    """The checkpoints of one stage: `folder`/step-00001000/, each with hashes of all it holds.

    A block `with checkpoints:` ends when the save in progress is published; if it ends by an error of the machine, the
    save is published too, as far as the other ranks are still there.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0) -> None:
        self.folder = folder
        self.keep = keep
        self.keep_every = keep_every
        self._writing: tuple[int, Thread] | None = None
        self._fault: Exception | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or (issubclass(kind, MachineError) and not issubclass(kind, ranks.Lost)):
            self.finish()

    def save(self, step: int, state: dict[str, Any], write: Write) -> None:
        """Begin a checkpoint of `step`: `state` (JSON) and the files of every rank's `write(folder)`.

        Every rank takes part. The files are written in the background, one checkpoint at a time; a fault is raised by
        the next call of `save`, `check` or `finish`.
        """
        self.finish()
        aside = ExitStack()
        try:
            folder = ranks.on_first(lambda: aside.enter_context(files.new_folder(self._path(step))))
        except OSError as error:
            self._fail(step, error)
        thread = Thread(target=self._write, args=(step, state, write, folder, aside), daemon=True)
        self._writing = (step, thread)
        thread.start()

    def check(self) -> None:
        """Raise MachineError where the save in progress has failed."""
        if self._writing and not self._writing[1].is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait until the save in progress is published. Raises MachineError where it failed."""
        if self._writing is None:
            return
        step, thread = self._writing
        thread.join()
        fault, self._writing, self._fault = self._fault, None, None
        if fault:
            self._fail(step, fault)

    def _fail(self, step: int, error: Exception) -> None:
        if not isinstance(error, OSError):
            raise error
        raise MachineError(
            f"checkpoint of step {step} could not be written to {self.folder} ({error.strerror or error}); "
            "earlier checkpoints are whole: make room, then run the same command again"
        ) from None

    def _write(self, step: int, state: dict[str, Any], write: Write, folder: Path, aside: ExitStack) -> None:
        """In the background: this rank's files; on rank 0 also the rest, once all ranks' files are there."""
        try:
            with aside:
                written = write(folder)
                if ranks.rank() == 0:
                    (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
                    written = [*written, folder / STATE]
                hashes = {str(path.relative_to(folder)): files.sha256(path) for path in written}
                for path in written:
                    files.sync(path)
                parts = ranks.handed_in(f"{self.folder} {step}", hashes)
                if parts:
                    merged = {name: digest for part in parts for name, digest in part.items()}
                    (folder / HASHES).write_text(json.dumps(merged, indent=1), encoding="utf-8")
            if parts:
                self._drop_old()
        except Exception as error:  # noqa: BLE001 # raised again in the main thread
            self._fault = error

    def _drop_old(self) -> None:
        spare = self._paths()[self.keep :]
        for old in spare:
            if not self.keep_every or _step(old) % self.keep_every:
                shutil.rmtree(old)

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Folder and state of the newest good checkpoint; a damaged one is named in the log and passed over."""
        files.remove_leftovers(self.folder)
        for path in self._paths():
            fault = damage(path)
            if fault is None:
                return path, json.loads((path / STATE).read_text(encoding="utf-8"))
            log.warning("checkpoint %s is damaged (%s): passing over it", path, fault)
        return None

    def steps(self) -> list[int]:
        """Steps of the checkpoints that there are."""
        return sorted(_step(path) for path in self._paths())

    def checked(self, step: int) -> Path:
        """The folder of a checkpoint that is there. Raises MachineError where it is damaged."""
        path = self._path(step)
        fault = damage(path)
        if fault:
            raise MachineError(f"checkpoint {path} is damaged ({fault}): take another step, of {self.steps()}")
        return path

    def drop_after(self, step: int) -> None:
        """Remove checkpoints beyond `step`: they are damaged, and their steps are about to be taken again."""
        for path in self._paths():
            if _step(path) > step:
                shutil.rmtree(path)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        hashes = json.loads((path / HASHES).read_text(encoding="utf-8"))
        for name, expected in hashes.items():
            if files.sha256(path / name) != expected:
                return f"{name} does not match its hash"
    except (OSError, ValueError) as error:
        return str(error)
    return None
