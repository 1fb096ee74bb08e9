"""Writing a cache of latents, in units: `SHARD_SIZE` consecutive images, which make one shard.

Finished units are kept, so a killed write goes on after them, and several processes, on several machines, can each make
a part of them beforehand. What of this is not about caches is that of shards of images: dvae/data/building/staging.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dvae.data.building import shard_request as request
from dvae.data.building.shard_jobs import Progress
from dvae.data.building.staging import Unfinished, at_work, faults
from dvae.data.latent_cache import FILE, CachedSample, CacheInfo, LatentCache, read_shard_list
from dvae.data.shards.manifest import Shard, refuse_bad_shards
from dvae.data.shards.reader import Shards
from dvae.data.shards.tar_files import ShardWriter, seal
from dvae.data.shards.verify import faults as damage
from dvae.errors import UserError
from dvae.utils.read import DamagedFile, forbid_extra

SHARD_SIZE = 1000
"""Images of a unit: what a killed process loses at the most, and the least that a part can be."""


@dataclass(frozen=True)
class Work:
    """What there is to write, and how it comes about."""

    about: CacheInfo
    batch: int
    """Images that the encoder takes at a time: the last bits of a latent may depend on it."""
    images: Shards
    """Of which the cache is; it knows which of them are damaged."""
    samples: Callable[[int, int], Iterator[CachedSample]]
    """Those of the images start, ..., stop - 1, which must not depend on what was asked for before."""

    def request(self) -> dict[str, Any]:
        """What the shards' bytes depend on."""
        return asdict(self.about) | {"batch": self.batch, "shard_size": SHARD_SIZE}

    def numbers(self) -> range:
        """Of all units."""
        return request.units(self.about.images, SHARD_SIZE)

    def indices(self, number: int) -> range:
        """Images of a unit."""
        return request.indices(number, SHARD_SIZE, self.about.images)


def write(folder: Path, work: Work, progress: Progress) -> None:
    """Write the cache into `folder`, which appears complete or not at all.

    The same request again makes what is missing, whoever made the rest; what another has left unfinished is removed.
    Where `folder` holds the cache already it is left as it is, after a look at its shards' hashes. All damaged images
    that were met are known to `work.images` in the end.
    Raises UserError where `folder` holds something else, or other processes are at work on it; MachineError where
    writing fails, or what is there is damaged: finished shards stay for the next attempt.
    """
    if _exists(folder):
        LatentCache(folder, work.about)  # refuses another's, or a damaged one
        return
    with faults(folder, "the cache"), at_work(folder, shared=False) as hidden:
        if _exists(folder):  # another process has written it meanwhile
            hidden.remove()
            LatentCache(folder, work.about)
            return
        hidden.take(work.request())
        units = Units(work, hidden, progress)
        finished = units.finished(work.numbers())
        hidden.clean(finished, [unit.shard for unit in finished.values()])
        made = units.complete(finished, work.numbers(), "work-all.")
        hidden.publish(FILE, asdict(work.about) | {"shards": [asdict(unit.shard) for unit in made]})


def write_part(folder: Path, work: Work, part: int, parts: int, progress: Progress) -> int:
    """Make part number `part` (0 is the first) of `parts` of the shards that `write` writes, for it to publish.

    Parts may be made at the same time or one after another. Returns how many images the part has, all made by now.
    Nothing is done where the cache is complete, and its shards are not looked at.
    Raises UserError and MachineError as `write` does, where another process is this part or is writing `folder`, and
    where parts of another request are there; whatever is raised, finished shards stay.
    """
    request.check_part(part, parts)
    numbers = request.block(work.numbers(), part, parts)
    images = sum(len(work.indices(number)) for number in numbers)
    if _published(folder, work):
        return images
    with faults(folder, "the cache"), at_work(folder, shared=True) as hidden:
        if _published(folder, work):  # another process has written it meanwhile
            hidden.remove()
            return images
        with hidden.part(part, parts) as name:
            hidden.join(work.request())
            units = Units(work, hidden, progress)
            units.complete(units.finished(numbers), numbers, name)
    return images


def _exists(folder: Path) -> bool:
    """Whether a cache is there, and not nothing. Raises UserError where it is something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / FILE).exists():
        raise UserError(f"cache.folder={folder} exists and holds no cache: use another cache.folder or remove it")
    return True


def _published(folder: Path, work: Work) -> bool:
    """Whether the cache is there. Raises UserError where it is that of another request."""
    return _exists(folder) and bool(read_shard_list(folder, work.about))


@forbid_extra
@dataclass(frozen=True)
class Unit:
    """What came of the images of a unit."""

    shard: Shard
    damaged: dict[int, str]
    """Images known to be damaged when it was finished: index -> file, key and reason."""


class Units:
    """Units of a cache, in the folder in which they are made."""

    def __init__(self, work: Work, folder: Unfinished, progress: Progress) -> None:
        self.work, self.folder, self.progress = work, folder, progress
        self._done = self._wanted = 0  # images

    def finished(self, numbers: Iterable[int]) -> dict[int, Unit]:
        """Those of `numbers` that any process has made, and whose shards are what they were."""
        noted = {number: self._noted(number) for number in numbers}
        return {number: unit for number, unit in noted.items() if unit and self._is_sound(unit)}

    def _noted(self, number: int) -> Unit | None:
        return self.folder.noted(number, self.work.request(), Unit)

    def _is_sound(self, unit: Unit) -> bool:
        members = len(self.work.about.members())
        try:
            refuse_bad_shards("the journal", [unit.shard], members)
        except DamagedFile:
            return False
        known = all(0 <= index < len(self.work.images) for index in unit.damaged)
        return known and not damage(self.folder.shards, unit.shard, members)

    def complete(self, finished: dict[int, Unit], numbers: range, aside: str) -> list[Unit]:
        """All units `numbers` but the `finished` ones made, in folders whose names begin with `aside`; gives them all.

        Raises MachineError where more images are damaged than may be, of those in `numbers`.
        """
        for unit in finished.values():
            self.work.images.add_damaged(unit.damaged)
        self._done = sum(unit.shard.count for unit in finished.values())
        self._wanted = sum(len(self.work.indices(number)) for number in numbers)
        self.progress(self._done, self._wanted)
        return [finished.get(number) or self._make(number, aside) for number in numbers]

    def _make(self, number: int, aside: str) -> Unit:
        """Write unit `number` aside, let its shard take its place, then note it."""
        indices = self.work.indices(number)
        with self.folder.aside(aside) as folder:
            writer = ShardWriter(folder / f"latents-{number:06d}.tar")
            try:
                for index, sample in zip(indices, self.work.samples(indices.start, indices.stop), strict=True):
                    writer.write(index, sample.members())
                    self._done += 1
                    self.progress(self._done, self._wanted)
            finally:  # after an error too: an open tar would complain when it is collected
                writer.close()
            unit = Unit(seal(writer.path, self.work.about.members()), dict(self.work.images.damaged))
            self.folder.finish(number, self.work.request(), asdict(unit), folder, [unit.shard])
        return unit
