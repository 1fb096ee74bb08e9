"""Building shards: every image of a source, rendered, split, and written as WebDataset tar files.

A unit is `shard_size` consecutive images of the source, written as one shard of those to train on and one of those held
out. Finished units are noted in a file beside them, so the same request goes on after them when a build was killed.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from webdataset import TarWriter

from dvae import files
from dvae.data.manifest import FILE, HELDOUT, TRAIN, Manifest, Shard
from dvae.data.render import Rendered, render, rendered
from dvae.data.verify import faults
from dvae.errors import MachineError, UserError, one_line
from dvae.registry import SOURCES, Shapes
from dvae.registry.sources import Source

Progress = Callable[[int, int], None]
"""progress(done, total), in images; first called with what an earlier attempt has done."""
JOURNAL = "unfinished.json"
"""What is finished already, in the folder of an unfinished build."""
MEMBERS = ("png", "json")
"""Files of each sample in a shard of images."""
NAMED = 20  # damaged images that are named; the others are only counted


@dataclass(frozen=True)
class Unit:
    """What came of `shard_size` consecutive images of the source."""

    images: int
    """How many they were; fewer than `shard_size` at the source's end."""
    shards: dict[str, Shard]
    """By split; a split that none of them fell to has no shard."""
    labels: dict[str, list[str | int]]
    """Every attribute, with all the values it takes."""
    damaged: list[str]
    """Images that could not be read, with the reason."""
    last: str
    """Digest of the last image: another one there means that images were added to the source or taken away."""


def build(
    source_node: Any,
    size: int,
    out: str | Path,
    heldout_fraction: float = 0.1,
    channels: int = 3,
    shard_size: int = 10_000,
    workers: int = 2,
    progress: Progress | None = None,
    max_bad_fraction: float = 0.01,
) -> Manifest:
    """Write the shards of a source into the folder `out`, which appears complete or not at all.

    An image is held out by a keyed hash of its pixels, so the splits are disjoint by construction: identical images
    (duplicates in the source) always land on the same side. The share held out is `heldout_fraction` up to chance.
    The shards' bytes do not depend on `workers`, nor on whether the build was interrupted: the same request goes on
    after the shards that were finished. Where `out` holds the request's shards already, they are left as they are.
    Raises UserError for a request that cannot work, or more than `max_bad_fraction` damaged images: nothing is left
    then; and MachineError where writing or a process fails: finished shards stay for the next attempt.
    """
    out = Path(out)
    _check(size, channels, heldout_fraction, shard_size, workers, max_bad_fraction)
    config = SOURCES.config(source_node)
    node = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    request = {
        "image_size": size,
        "channels": channels,
        "source": node,
        "heldout_fraction": heldout_fraction,
        "shard_size": shard_size,
    }
    if (existing := _existing(out, request)) is not None:
        return existing
    source = SOURCES.build(node, Shapes(image_size=size, channels=channels))
    try:
        with _unfinished(out) as aside:
            if (existing := _existing(out, request)) is not None:  # another process has built it meanwhile
                shutil.rmtree(aside, ignore_errors=True)
                return existing
            manifest = _Build(source, request, aside, progress, max_bad_fraction).run(workers)
            _publish(aside, out)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"shards cannot be written to {out} ({error.strerror}): choose another folder") from None
    except BrokenProcessPool as error:
        raise MachineError(
            f"a process that renders images for {out} died ({one_line(error)}): finished shards are kept, the same "
            "command again goes on after them"
        ) from None
    except OSError as error:
        raise MachineError(
            f"writing shards to {out} failed: {one_line(error)}; finished shards are kept, the same command again goes "
            "on after them"
        ) from None
    return manifest


def _check(size: int, channels: int, heldout: float, shard_size: int, workers: int, max_bad: float) -> None:
    if size < 1:
        raise UserError(f"size={size}: use 1 or more pixels")
    if channels not in (1, 3):
        raise UserError(f"channels={channels}: images have 1 or 3 channels")
    for name, fraction in (("heldout", heldout), ("max_bad_fraction", max_bad)):
        if not 0 <= fraction < 1:
            raise UserError(f"{name}={fraction}: use a fraction of at least 0 and below 1")
    if shard_size < 1:
        raise UserError(f"shard_size={shard_size}: use 1 or more")
    if workers < 1:
        raise UserError(f"workers={workers}: use 1 or more")


def _existing(out: Path, request: dict[str, Any]) -> Manifest | None:
    """The manifest at `out` if it is of this request; None where nothing is there. Raises UserError otherwise."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / FILE).exists():
        raise UserError(f"{out} exists and holds no shards: choose another folder or remove it")
    manifest = Manifest.load(out)
    there = manifest.request()
    for key, wanted in request.items():
        if there[key] != wanted:
            raise UserError(
                f"{out} holds shards of another request ({_difference(key, there[key], wanted)}): "
                "choose another folder or remove it"
            )
    return manifest


def _difference(key: str, there: Any, wanted: Any) -> str:
    """What differs, with a source's single field where only that differs."""
    if isinstance(there, dict) and isinstance(wanted, dict):
        key, there, wanted = next(
            (f"{key}.{k}", there.get(k), wanted.get(k)) for k in {**there, **wanted} if there.get(k) != wanted.get(k)
        )
    return f"{key} {there}, not {wanted}"


@contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """The hidden folder beside `out` where its shards are made, locked until this process ends.

    It stays where the build is interrupted, and goes where it fails for good. Raises UserError where another process is
    at work in it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.absolute().with_name(f".{out.absolute().name}.building")
    aside.mkdir(exist_ok=True)
    handle = os.open(aside, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when this process dies
        except BlockingIOError:
            raise UserError(f"another process is building {out} now: wait for it or choose another folder") from None
        try:
            yield aside
        except UserError:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def _publish(aside: Path, out: Path) -> None:
    """Let the finished folder appear."""
    (aside / JOURNAL).unlink(missing_ok=True)
    aside.chmod(0o755)
    files.sync(aside)
    aside.replace(out.absolute())
    files.sync(out.absolute().parent)


class _Build:
    """One request, made in the folder `aside`."""

    def __init__(
        self, source: Source, request: dict[str, Any], aside: Path, progress: Progress | None, max_bad_fraction: float
    ) -> None:
        self.source, self.request, self.folder = source, request, aside
        self.total, self.shard_size = len(source), int(request["shard_size"])
        self.progress = progress or (lambda done, total: None)
        self.max_bad_fraction = max_bad_fraction

    def run(self, workers: int) -> Manifest:
        """Make the units that are not there yet, and the manifest."""
        if (self.folder / FILE).exists():  # it was killed between the last shard and publishing
            manifest = Manifest.load(self.folder)
            if {**manifest.request(), **self.request} == manifest.request():
                return manifest
        units = self._finished()
        self._clean(units)
        damaged = [reason for unit in units for reason in unit.damaged]
        self._refuse_many(damaged)
        done = sum(unit.images for unit in units)
        self.progress(done, self.total)
        with closing(rendered(self.source, done, workers)) as images:
            for number in range(len(units), math.ceil(self.total / self.shard_size)):
                units.append(self._make(number, islice(images, self.shard_size), damaged))
                damaged = damaged + units[-1].damaged
                journal = {"request": self.request, "units": [asdict(unit) for unit in units]}
                files.write_json(self.folder / JOURNAL, journal)
        manifest = self._manifest(units)
        files.write_json(self.folder / FILE, manifest.as_dict())
        return manifest

    def _finished(self) -> list[Unit]:
        """The units that an earlier attempt at this request finished, as far as they and the source are unchanged."""
        try:
            journal = json.loads((self.folder / JOURNAL).read_text(encoding="utf-8"))
            noted = [Unit(**{**row, "shards": _shards(row["shards"])}) for row in journal["units"]]
            same = journal["request"] == self.request
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return []  # no journal, or one of another version: start over
        units: list[Unit] = []
        for number, unit in enumerate(noted if same else []):
            if not self._sound(number, unit):
                break
            units.append(unit)
        return units

    def _sound(self, number: int, unit: Unit) -> bool:
        start = number * self.shard_size
        if unit.images != min(self.shard_size, self.total - start):
            return False
        if any(faults(self.folder, shard) for shard in unit.shards.values()):
            return False
        return render(self.source, start + unit.images - 1).digest() == unit.last

    def _clean(self, units: list[Unit]) -> None:
        """Remove all but the files of finished units."""
        shards = [shard for unit in units for shard in unit.shards.values()]
        kept = {JOURNAL, *(shard.file for shard in shards), *(shard.index for shard in shards)}
        for path in self.folder.iterdir():
            if path.name not in kept:
                path.unlink()

    def _make(self, number: int, images: Iterable[Rendered], earlier: list[str]) -> Unit:
        """Write unit `number`; `earlier` are the damaged images of those before it."""
        writers: dict[str, ShardWriter] = {}
        values: dict[str, set[str | int]] = {}
        damaged: list[str] = []
        count, image = 0, None
        try:
            for image in images:
                if image.damage:
                    damaged.append(image.damage)
                    self._refuse_many(earlier + damaged)
                else:
                    split = HELDOUT if image.position < self.request["heldout_fraction"] else TRAIN
                    if split not in writers:
                        writers[split] = ShardWriter(self.folder / f"{split}-{number:06d}.tar")
                    writers[split].write(image.index, {"png": image.png, "json": image.about()})
                    for name, value in image.labels.items():
                        values.setdefault(name, set()).add(value)
                count += 1
                self.progress(image.index + 1, self.total)
        finally:  # after an error too: an open tar would complain when it is collected
            for writer in writers.values():
                writer.close()
        shards = {split: seal(writer.path) for split, writer in writers.items()}
        assert image is not None  # a unit has at least one
        return Unit(count, shards, {name: list(seen) for name, seen in values.items()}, damaged, image.digest())

    def _refuse_many(self, damaged: list[str]) -> None:
        if len(damaged) > self.max_bad_fraction * self.total:
            raise UserError(
                f"more than {self.max_bad_fraction:.3g} of {self.total} images are damaged ({'; '.join(damaged[:3])}): "
                "mend or remove them, or raise max_bad_fraction"
            )

    def _manifest(self, units: list[Unit]) -> Manifest:
        splits = {split: [u.shards[split] for u in units if split in u.shards] for split in (TRAIN, HELDOUT)}
        if not splits[TRAIN]:
            raise UserError(
                f"none of {self.total} images is left for training with heldout={self.request['heldout_fraction']}: "
                "hold fewer out"
            )
        values: dict[str, set[str | int]] = {}
        for unit in units:
            for name, seen in unit.labels.items():
                values.setdefault(name, set()).update(seen)
        damaged = [reason for unit in units for reason in unit.damaged]
        return Manifest(
            **self.request,
            licence=self.source.licence,
            protocol=self.source.protocol,
            splits=splits,
            labels={name: sorted(values[name], key=lambda v: (isinstance(v, str), v)) for name in sorted(values)},
            damaged=len(damaged),
            damaged_first=damaged[:NAMED],
        )


def _shards(rows: dict[str, dict[str, Any]]) -> dict[str, Shard]:
    return {split: Shard(**row) for split, row in rows.items()}


class ShardWriter:
    """One tar file, being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # a stream, not a name: webdataset would take a % or | in the folder's name for a pattern or a pipe
        self._stream = path.open("wb")
        self._tar = TarWriter(self._stream, encoder=False, mtime=0)

    def write(self, number: int, members: dict[str, bytes]) -> None:
        # WebDataset cuts a name at its first dot, so a file name cannot be the key
        self._tar.write({"__key__": f"{number:09d}", **members})

    def close(self) -> None:
        self._tar.close()
        self._stream.close()


def seal(path: Path, members: tuple[str, ...] = MEMBERS) -> Shard:
    """Write a finished tar file's index, and see both to the disk."""
    index = path.with_suffix(".npy")
    rows = index_of(path, members)
    with index.open("wb") as file:
        np.save(file, rows)
    files.sync(path)
    files.sync(index)
    return Shard(path.name, len(rows), path.stat().st_size, files.sha256(path), index.name, files.sha256(index))


def index_of(path: Path, members: tuple[str, ...] = MEMBERS) -> np.ndarray:
    """Offset and size of each sample's members in a shard, (count, 2 * members), int64, in the order of the samples."""
    with tarfile.open(path, "r:") as tar:
        places = {member.name: (member.offset_data, member.size) for member in tar}
    keys = dict.fromkeys(name.partition(".")[0] for name in places)
    rows = [[number for member in members for number in places[f"{key}.{member}"]] for key in keys]
    return np.array(rows, dtype=np.int64).reshape(-1, 2 * len(members))
