"""Building shards: every image of a source, rendered, split, and written as WebDataset tar files.

The work is cut into units (dvae/data/building/shard_jobs.py). Finished ones are kept, so the same request goes on
after them when a build was killed, and several processes, on several machines, can each make a part of them beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dvae.data.building import shard_request
from dvae.data.building.shard_jobs import Progress, Unit, Units
from dvae.data.building.staging import at_work, faults
from dvae.data.shards.manifest import FILE, HELDOUT, TRAIN, Manifest
from dvae.errors import MachineError, UserError, fold
from dvae.registry.core import Shapes
from dvae.registry.sources.base import SOURCES, Source

NAMED = 20  # damaged images that are named; the others are only counted


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
    The shards' bytes do not depend on `workers`, nor on whether the build was interrupted, nor on whether parts of it
    were made before (`build_part`): the same request makes what is missing. What another request has left unfinished
    is removed. Where `out` holds the request's shards already, they are left as they are.
    Raises UserError for a request that cannot work, or more than `max_bad_fraction` damaged images: nothing is left
    then; where other processes are at work on `out`; and MachineError where writing or a process fails: finished shards
    stay for the next attempt.
    """
    shard_request.check(size, channels, heldout_fraction, shard_size, workers, max_bad_fraction)
    out, wanted = Path(out), _request(source_node, size, heldout_fraction, channels, shard_size)
    if (existing := _existing(out, wanted)) is not None:
        return existing
    source = _source(wanted)
    with _faults(out), at_work(out, shared=False) as folder:
        if (existing := _existing(out, wanted)) is not None:  # another process has built it meanwhile
            folder.remove()
            return existing
        folder.take(wanted)
        try:
            units = Units(source, wanted, folder, progress, max_bad_fraction)
            numbers = shard_request.units(len(source), shard_size)
            finished = units.finished(numbers)
            folder.clean(finished, [shard for unit in finished.values() for shard in unit.shards.values()])
            manifest = _manifest(source, wanted, units.complete(finished, numbers, workers, "work-all."))
        except UserError:
            folder.remove()
            raise
        folder.publish(FILE, manifest.as_dict())
    return manifest


def build_part(
    source_node: Any,
    size: int,
    out: str | Path,
    part: int,
    parts: int,
    heldout_fraction: float = 0.1,
    channels: int = 3,
    shard_size: int = 10_000,
    workers: int = 2,
    progress: Progress | None = None,
    max_bad_fraction: float = 0.01,
) -> int:
    """Make part number `part` (0 is the first) of `parts` of the shards that `build` writes, for it to publish.

    Parts may be made at the same time, by processes on machines that share the file system, or one after another; when
    they have ended, `build` with the same arguments finds what they have made, makes what is missing, and lets `out`
    appear. A part is made of whole shards, so where there are fewer of them than parts, some parts are empty.
    Returns how many images of the source the part has, all made by now. `progress` and `max_bad_fraction` (of all
    images) count this part's alone. Nothing is done where `out` is complete.
    Raises UserError and MachineError as `build` does, where another process is this part or is building `out`, and
    where parts of another request are there; whatever is raised, finished shards stay.
    """
    shard_request.check(size, channels, heldout_fraction, shard_size, workers, max_bad_fraction)
    shard_request.check_part(part, parts)
    out, wanted = Path(out), _request(source_node, size, heldout_fraction, channels, shard_size)
    if (existing := _existing(out, wanted)) is not None:
        return _share(existing, part, parts)
    source = _source(wanted)
    numbers = shard_request.block(shard_request.units(len(source), shard_size), part, parts)
    with _faults(out), at_work(out, shared=True) as folder:
        if (existing := _existing(out, wanted)) is not None:  # another process has built it meanwhile
            folder.remove()
            return _share(existing, part, parts)
        with folder.part(part, parts) as work:
            folder.join(wanted)
            units = Units(source, wanted, folder, progress, max_bad_fraction)
            made = units.complete(units.finished(numbers), numbers, workers, work)
    return sum(unit.images for unit in made.values())


def _request(source_node: Any, size: int, heldout_fraction: float, channels: int, shard_size: int) -> dict[str, Any]:
    """What the shards' bytes depend on, besides the source's files."""
    config = SOURCES.config(source_node)
    return {
        "image_size": size,
        "channels": channels,
        "source": OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True),
        "heldout_fraction": heldout_fraction,
        "shard_size": shard_size,
    }


def _source(wanted: dict[str, Any]) -> Source:
    return SOURCES.build(wanted["source"], Shapes(image_size=wanted["image_size"], channels=wanted["channels"]))


def _existing(out: Path, wanted: dict[str, Any]) -> Manifest | None:
    """The manifest at `out` if it is of this request; None where nothing is there. Raises UserError otherwise."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / FILE).exists():
        raise UserError(f"{out} exists and holds no shards: choose another folder or remove it")
    manifest = Manifest.load(out)
    if different := shard_request.difference(manifest.request(), wanted):
        raise UserError(f"{out} holds shards of another request ({different}): choose another folder or remove it")
    return manifest


def _share(manifest: Manifest, part: int, parts: int) -> int:
    """Images of the source that a part of complete shards has, damaged ones included."""
    total = manifest.count(TRAIN) + manifest.count(HELDOUT) + manifest.damaged
    numbers = shard_request.block(shard_request.units(total, manifest.shard_size), part, parts)
    return sum(len(shard_request.indices(number, manifest.shard_size, total)) for number in numbers)


@contextmanager
def _faults(out: Path) -> Iterator[None]:
    """Faults of the machine, in one line."""
    try:
        with faults(out, "shards"):
            yield
    except BrokenProcessPool as error:
        raise MachineError(
            f"a process that renders images for {out} died ({fold(error)}): finished shards are kept, the same "
            "command again goes on after them"
        ) from None


def _manifest(source: Source, wanted: dict[str, Any], units: dict[int, Unit]) -> Manifest:
    """Raises UserError where nothing is left to train on."""
    splits = {split: [u.shards[split] for u in units.values() if split in u.shards] for split in (TRAIN, HELDOUT)}
    if not splits[TRAIN]:
        raise UserError(
            f"none of {len(source)} images is left for training with heldout={wanted['heldout_fraction']}: "
            "hold fewer out"
        )
    values: dict[str, set[str | int]] = {}
    for unit in units.values():
        for name, seen in unit.labels.items():
            values.setdefault(name, set()).update(seen)
    damaged = [reason for unit in units.values() for reason in unit.damaged]
    return Manifest(
        **wanted,
        license=source.license,
        protocol=source.protocol,
        splits=splits,
        labels={name: sorted(values[name], key=lambda v: (isinstance(v, str), v)) for name in sorted(values)},
        damaged=len(damaged),
        damaged_first=damaged[:NAMED],
    )
