"""Units of a build: `shard_size` consecutive images of the source, written as one shard of those to train on and one of
those held out, and noted in a journal of their own when that is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dvae.data.building import shard_request
from dvae.data.building.render import Rendered, render, rendered
from dvae.data.building.staging import Unfinished
from dvae.data.shards.manifest import HELDOUT, TRAIN, Shard, refuse_bad_shards
from dvae.data.shards.tar_files import ShardWriter, seal
from dvae.data.shards.verify import faults
from dvae.errors import UserError
from dvae.registry.sources.base import Source
from dvae.utils.read import DamagedFile, forbid_extra

Progress = Callable[[int, int], None]
"""progress(done, total), in images; first called with what an earlier attempt has done."""


@forbid_extra
@dataclass(frozen=True)
class Unit:
    """What came of the images of a unit."""

    images: int
    """How many they were; fewer than `shard_size` at the source's end."""
    shards: dict[str, Shard]
    """By split; a split that none of them fell to has no shard."""
    labels: dict[str, list[str | int]]
    """Every attribute, with all the values it takes."""
    damaged: list[str]
    """Images that could not be read, with the reason."""
    ends: list[str]
    """Digests of the first and the last image: others there mean that images were added to the source or taken away."""


class Units:
    """Units of the request `wanted`, in the folder in which they are made."""

    def __init__(
        self, source: Source, wanted: dict[str, Any], folder: Unfinished, progress: Progress | None, max_bad: float
    ) -> None:
        self.source, self.request, self.folder = source, wanted, folder
        self.total, self.shard_size = len(source), int(wanted["shard_size"])
        self.progress = progress or (lambda done, total: None)
        self.max_bad_fraction = max_bad
        self._done = self._wanted = 0  # images

    def finished(self, numbers: Iterable[int]) -> dict[int, Unit]:
        """Those of `numbers` that were made, by whomever, as far as they and the source are unchanged."""
        noted = {number: self._noted(number) for number in numbers}
        return {number: unit for number, unit in noted.items() if unit and self._sound(number, unit)}

    def _noted(self, number: int) -> Unit | None:
        """The unit that its journal names; None if there is no journal, or one that no build has written."""
        unit: Unit | None = self.folder.noted(number, self.request, Unit)
        try:
            refuse_bad_shards(self.folder.journal(number), unit.shards.values() if unit else [])
        except DamagedFile:
            return None
        return unit if unit and set(unit.shards) <= {TRAIN, HELDOUT} else None

    def _sound(self, number: int, unit: Unit) -> bool:
        images = self._images(number)
        if unit.images != len(images) or any(faults(self.folder.shards, shard) for shard in unit.shards.values()):
            return False
        return unit.ends == [render(self.source, index).digest() for index in (images[0], images[-1])]

    def _images(self, number: int) -> range:
        return shard_request.indices(number, self.shard_size, self.total)

    def complete(self, finished: dict[int, Unit], numbers: range, workers: int, work: str) -> dict[int, Unit]:
        """All units `numbers` but the `finished` ones made, in folders whose names begin with `work`; gives them all.

        Raises UserError where more images are damaged than may be, of those in `numbers`.
        """
        damaged = [reason for unit in finished.values() for reason in unit.damaged]
        self._refuse_many(damaged)
        self._done = sum(unit.images for unit in finished.values())
        self._wanted = sum(len(self._images(number)) for number in numbers)
        self.progress(self._done, self._wanted)
        missing = [number for number in numbers if number not in finished]
        units = dict(finished)
        with closing(rendered(self.source, [self._images(number) for number in missing], workers)) as images:
            for number in missing:
                units[number] = self._make(number, islice(images, len(self._images(number))), damaged, work)
                damaged = damaged + units[number].damaged
        return {number: units[number] for number in numbers}

    def _make(self, number: int, images: Iterable[Rendered], earlier: list[str], work: str) -> Unit:
        """Write unit `number` aside, let its shards take their places, then note it; `earlier` are damaged images."""
        with self.folder.aside(work) as aside:
            unit = self._write(number, images, earlier, aside)
            self.folder.finish(number, self.request, asdict(unit), aside, unit.shards.values())
        return unit

    def _write(self, number: int, images: Iterable[Rendered], earlier: list[str], aside: Path) -> Unit:
        writers: dict[str, ShardWriter] = {}
        values: dict[str, set[str | int]] = {}
        damaged: list[str] = []
        ends: list[Rendered] = []
        try:
            for image in images:
                ends = [*ends[:1], image]
                if image.damage:
                    damaged.append(image.damage)
                    self._refuse_many(earlier + damaged)
                else:
                    split = HELDOUT if image.position < self.request["heldout_fraction"] else TRAIN
                    if split not in writers:
                        writers[split] = ShardWriter(aside / f"{split}-{number:06d}.tar")
                    writers[split].write(image.index, {"png": image.png, "json": image.about()})
                    for name, value in image.labels.items():
                        values.setdefault(name, set()).add(value)
                self._done += 1
                self.progress(self._done, self._wanted)
        finally:  # after an error too: an open tar would complain when it is collected
            for writer in writers.values():
                writer.close()
        shards = {split: seal(writer.path) for split, writer in writers.items()}
        labels = {name: list(seen) for name, seen in values.items()}
        digests = [ends[0].digest(), ends[-1].digest()]  # a unit has at least one image
        return Unit(len(self._images(number)), shards, labels, damaged, digests)

    def _refuse_many(self, damaged: list[str]) -> None:
        if len(damaged) > self.max_bad_fraction * self.total:
            raise UserError(
                f"more than {self.max_bad_fraction:.3g} of {self.total} images are damaged ({'; '.join(damaged[:3])}): "
                "mend or remove them, or raise max_bad_fraction"
            )
