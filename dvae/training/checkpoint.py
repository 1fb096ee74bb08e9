"""Checkpoints: complete or absent, hashed, newest good one first."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dvae import files
from dvae.errors import MachineError
from dvae.training import ranks

log = logging.getLogger("dvae")
HASHES = "hashes.json"
STATE = "state.json"


class Checkpoints:
    """The checkpoints of one stage: `folder`/step-00001000/, each with hashes of all it holds."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, step: int, state: dict[str, Any], write: Callable[[Path], None]) -> None:
        """Publish a checkpoint of `step`: `state` (JSON) and the files that every rank's `write(folder)` makes.

        Every rank takes part; rank 0 makes the folder, hashes all parts once they are there, and renames it.
        """
        try:
            with self._aside(step) as aside:
                write(aside)
                ranks.barrier()
                if ranks.rank() == 0:
                    _seal(aside, state)
        except OSError as error:
            raise MachineError(
                f"checkpoint of step {step} could not be written to {self.folder} ({error.strerror or error}); "
                "earlier checkpoints are whole: make room, then run the same command again"
            ) from None
        ranks.on_first(self._drop_old)

    @contextmanager
    def _aside(self, step: int) -> Iterator[Path]:
        """The new folder of a checkpoint: rank 0's, on every rank."""
        with ExitStack() as stack:
            yield ranks.on_first(lambda: stack.enter_context(files.new_folder(self._path(step))))

    def _drop_old(self) -> None:
        for old in self._paths()[self.keep :]:
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

    def drop_after(self, step: int) -> None:
        """Remove checkpoints beyond `step`: they are damaged, and their steps are about to be taken again."""
        for path in self._paths():
            if _step(path) > step:
                shutil.rmtree(path)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), reverse=True)


def _seal(folder: Path, state: dict[str, Any]) -> None:
    """Add the state, and the hashes of all that is there."""
    (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
    parts = [item for item in sorted(folder.rglob("*")) if item.is_file()]
    hashes = {str(item.relative_to(folder)): files.sha256(item) for item in parts}
    (folder / HASHES).write_text(json.dumps(hashes, indent=1), encoding="utf-8")


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
