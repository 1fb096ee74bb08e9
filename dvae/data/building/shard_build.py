"""Build shards: render every image of a source, split the images, and write them as WebDataset tar files.

The work is cut into numbered jobs (numbered_jobs.py, shard_jobs.py), and finished jobs are kept. The same request
therefore resumes a build that was killed, and several processes can each build a part of the shards first.
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

    A keyed hash of an image's pixels decides whether it is held out. Identical images in the source therefore always
    fall into the same split, and the splits are disjoint. The held-out share is `heldout_fraction` up to chance.

    The shards' bytes do not depend on `workers`, on interruptions, or on parts that were built before (`build_part`):
    the same request builds only the missing shards. Unfinished work of a different request is removed. If `out` already
    holds the request's shards, nothing is changed.

    Args:
        source_node: Config of the source.
        size: Height and width of the images in pixels.
        out: Folder to create.
        heldout_fraction: Share of the images to hold out, in [0, 1).
        channels: 1 (gray) or 3 (RGB).
        shard_size: Images of the source per job. Each job writes at most one shard per split.
        workers: Number of processes that render images.
        progress: Called with (done, total) in images.
        max_bad_fraction: Largest share of damaged images, in [0, 1), that the build accepts.

    Returns the manifest of the shards.

    Raises:
        UserError: If the request is invalid, too many images are damaged, or other processes work on `out`. Finished
            shards are removed if too many images are damaged or none is left for training.
        MachineError: If writing fails or a rendering process dies. Finished shards are kept for the next attempt.
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
    """Build part number `part` (from 0) of `parts` of the shards that `build` publishes.

    Parts may be built one after another, or at the same time by processes on machines that share the file system. When
    they have ended, `build` with the same arguments reuses their shards, builds the missing ones and publishes `out`.
    A part consists of whole jobs. If there are fewer jobs than parts, some parts are empty.

    `progress` and `max_bad_fraction` count the damaged images of this part only, the latter as a share of all images.
    Nothing is done if `out` is complete. Returns the number of source images of the part, all of which are now built.

    Raises UserError and MachineError for the same reasons as `build`. Also raises UserError if another process builds
    this part, or if the staging folder holds parts of a different request. Finished shards are kept after any error.
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
    """Return everything that the shards' bytes depend on, except the source's files."""
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
    """Return the number of source images of a part of published shards, including damaged images."""
    images = manifest.count(TRAIN) + manifest.count(HELDOUT) + manifest.damaged
    numbers = shard_request.jobs_of_part(shard_request.job_numbers(images, manifest.shard_size), part, parts)
    return sum(len(shard_request.job_images(number, manifest.shard_size, images)) for number in numbers)


@contextmanager
def _render_errors(out: Path) -> Iterator[None]:
    """Raise MachineError if a rendering process dies."""
    try:
        yield
    except BrokenProcessPool as error:
        raise MachineError(
            f"a process that renders images for {out} died ({fold(error)}): finished shards are kept, run the same "
            "command again to continue"
        ) from None
