"""Build shards: every image of a source, rendered, split, and written as WebDataset tar files.

The work is cut into numbered jobs (numbered_jobs.py, shard_jobs.py), which are kept when they are finished. So the same
request goes on after a build that was killed, and several processes can each build a part of the shards beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dvae.data.building import numbered_jobs, shard_request
from dvae.data.building.numbered_jobs import ReportProgress, images_of_part
from dvae.data.building.shard_jobs import ShardJobs, published_manifest
from dvae.data.shards.manifest import HELDOUT, TRAIN, Manifest
from dvae.errors import MachineError, fold
from dvae.registry.core import Shapes
from dvae.registry.sources.base import SOURCES, Source


def build(
    source_node: Any,
    size: int,
    out: str | Path,
    heldout_fraction: float = 0.1,
    channels: int = 3,
    shard_size: int = 10_000,
    workers: int = 2,
    progress: ReportProgress | None = None,
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
    shard_request.check_settings(size, channels, heldout_fraction, shard_size, workers, max_bad_fraction)
    out, request = Path(out), _request(source_node, size, heldout_fraction, channels, shard_size)
    if (existing := published_manifest(out, request)) is not None:
        return existing
    jobs = ShardJobs(_open_source(request), request, workers, max_bad_fraction, progress)
    with _render_errors(out):
        numbered_jobs.build(jobs, out)
    return Manifest.load(out)


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
    progress: ReportProgress | None = None,
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
    shard_request.check_settings(size, channels, heldout_fraction, shard_size, workers, max_bad_fraction)
    shard_request.check_part(part, parts)
    out, request = Path(out), _request(source_node, size, heldout_fraction, channels, shard_size)
    if (existing := published_manifest(out, request)) is not None:
        return _published_images_of_part(existing, part, parts)
    jobs = ShardJobs(_open_source(request), request, workers, max_bad_fraction, progress)
    with _render_errors(out):
        numbered_jobs.build_part(jobs, out, part, parts)
    return images_of_part(jobs, part, parts)


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


def _open_source(request: dict[str, Any]) -> Source:
    return SOURCES.build(request["source"], Shapes(image_size=request["image_size"], channels=request["channels"]))


def _published_images_of_part(manifest: Manifest, part: int, parts: int) -> int:
    """Images of the source that a part of complete shards has, damaged ones included."""
    images = manifest.count(TRAIN) + manifest.count(HELDOUT) + manifest.damaged
    numbers = shard_request.jobs_of_part(shard_request.job_numbers(images, manifest.shard_size), part, parts)
    return sum(len(shard_request.job_images(number, manifest.shard_size, images)) for number in numbers)


@contextmanager
def _render_errors(out: Path) -> Iterator[None]:
    """Translate the death of a rendering process into MachineError."""
    try:
        yield
    except BrokenProcessPool as error:
        raise MachineError(
            f"a process that renders images for {out} died ({fold(error)}): finished shards are kept, the same "
            "command again goes on after them"
        ) from None
