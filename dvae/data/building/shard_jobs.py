"""Jobs that build the shards of a source. Each writes one shard of training images and one of held-out images."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from dvae.data.building import shard_request
from dvae.data.building.numbered_jobs import NumberedJobs, ReportProgress
from dvae.data.building.render import RenderedImage, render, render_all
from dvae.data.shards.manifest import FILE, HELDOUT, TRAIN, Manifest, Shard
from dvae.data.shards.tar_files import ShardWriter, seal
from dvae.errors import UserError
from dvae.registry.sources.base import Source
from dvae.utils.read import forbid_extra

MAX_NAMED = 20
"""Maximum number of damaged images that the manifest lists. It only counts the others."""


@forbid_extra
@dataclass(frozen=True)
class ShardJobResult:
    """The result of a finished job."""

    images: int
    """Number of images. The last job of a source may have fewer than `shard_size`."""
    shards: dict[str, Shard]
    """Shards by split. A split without images has no shard."""
    labels: dict[str, list[str | int]]
    """Every attribute, with all the values it takes."""
    damaged: list[str]
    """Images that could not be read, with the reason."""
    ends: list[str]
    """Digests of the first and last image. They change if images are added to the source or removed from it."""


class ShardJobs(NumberedJobs[ShardJobResult]):
    """All jobs that build the shards of a source."""

    what: ClassVar[str] = "shards"
    record_file: ClassVar[str] = FILE
    result_type: ClassVar[type] = ShardJobResult
    discard_on_user_error: ClassVar[bool] = True

    def __init__(
        self,
        source: Source,
        request: dict[str, Any],
        workers: int,
        max_bad_fraction: float,
        report: ReportProgress | None,
    ) -> None:
        super().__init__(request, len(source), int(request["shard_size"]), 2, report)
        self.source, self.workers, self.max_bad_fraction = source, workers, max_bad_fraction
        self._damaged: list[str] = []
        self._rendered: Generator[RenderedImage]

    def is_published(self, out: Path) -> bool:
        return published_manifest(out, self.request) is not None

    def shards_of(self, result: ShardJobResult) -> list[Shard]:
        return list(result.shards.values())

    def is_current(self, number: int, result: ShardJobResult) -> bool:
        images = self.images_of(number)
        if result.images != len(images) or not set(result.shards) <= {TRAIN, HELDOUT}:
            return False
        return result.ends == [render(self.source, index).digest() for index in (images[0], images[-1])]

    def resume(self, finished: Iterable[ShardJobResult]) -> None:
        self._damaged = [reason for result in finished for reason in result.damaged]
        self._check_damage()

    @contextmanager
    def prepare(self, missing: list[int]) -> Iterator[None]:
        with closing(render_all(self.source, list(map(self.images_of, missing)), self.workers)) as self._rendered:
            yield

    def write(self, number: int, folder: Path) -> ShardJobResult:
        images = self.images_of(number)
        writers: dict[str, ShardWriter] = {}
        values: dict[str, set[str | int]] = {}
        known = len(self._damaged)
        ends: list[RenderedImage] = []
        try:
            for image in islice(self._rendered, len(images)):
                ends = [*ends[:1], image]
                if image.damage:
                    self._damaged.append(image.damage)
                    self._check_damage()
                else:
                    split = HELDOUT if image.position < self.request["heldout_fraction"] else TRAIN
                    if split not in writers:
                        writers[split] = ShardWriter(folder / f"{split}-{number:06d}.tar")
                    writers[split].write(image.index, {"png": image.png, "json": image.metadata()})
                    for name, value in image.labels.items():
                        values.setdefault(name, set()).add(value)
                self.advance()
        finally:  # close after errors too: an open tar file warns when it is garbage-collected
            for writer in writers.values():
                writer.close()
        shards = {split: seal(writer.path) for split, writer in writers.items()}
        labels = {name: list(seen) for name, seen in values.items()}
        digests = [ends[0].digest(), ends[-1].digest()]  # a job has at least one image
        return ShardJobResult(len(images), shards, labels, self._damaged[known:], digests)

    def _check_damage(self) -> None:
        """Raise UserError if the share of damaged images exceeds `max_bad_fraction`."""
        if len(self._damaged) > self.max_bad_fraction * self.images:
            raise UserError(
                f"more than {self.max_bad_fraction:.3g} of {self.images} images are damaged "
                f"({'; '.join(self._damaged[:3])}): repair or remove them, or raise max_bad_fraction"
            )

    def record(self, results: list[ShardJobResult]) -> dict[str, Any]:
        splits = {split: [r.shards[split] for r in results if split in r.shards] for split in (TRAIN, HELDOUT)}
        if not splits[TRAIN]:
            raise UserError(
                f"none of {self.images} images is left for training with "
                f"heldout_fraction={self.request['heldout_fraction']}: use a smaller heldout_fraction"
            )
        values: dict[str, set[str | int]] = {}
        for result in results:
            for name, seen in result.labels.items():
                values.setdefault(name, set()).update(seen)
        damaged = [reason for result in results for reason in result.damaged]
        return Manifest(
            **self.request,
            license=self.source.license,
            protocol=self.source.protocol,
            splits=splits,
            labels={name: sorted(values[name], key=lambda v: (isinstance(v, str), v)) for name in sorted(values)},
            damaged=len(damaged),
            damaged_first=damaged[:MAX_NAMED],
        ).as_dict()


def published_manifest(out: Path, request: dict[str, Any]) -> Manifest | None:
    """Return the manifest at `out` if it belongs to this request, or None if `out` is missing or empty.

    Raises UserError if `out` holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / FILE).exists():
        raise UserError(f"{out} exists and holds no shards: choose another folder or remove it")
    manifest = Manifest.load(out)
    if different := shard_request.difference(manifest.request(), request):
        raise UserError(f"{out} holds shards of another request ({different}): choose another folder or remove it")
    return manifest
