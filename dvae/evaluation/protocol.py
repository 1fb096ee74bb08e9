"""The protocol of an evaluation: the settings that must agree before two results may be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dvae.errors import UserError
from dvae.utils.read import DamagedFile, check

_ABOUT_THE_SETS = {"compared": False}


@dataclass(frozen=True, kw_only=True)
class EvaluationProtocol:
    """How sets of images were scored. It is part of every result; `dataclasses.asdict` makes it JSON-ready."""

    backend: str
    """Package that computes the metrics, with its version."""
    extractor: str
    """Network whose features are compared."""
    weights_sha256: str
    """Hash of the extractor's weights."""
    resize: str
    """How images are resized to the extractor's input size."""
    image_size: int
    """Height of the images, in pixels."""
    n: int
    """Number of images per set and seed."""
    reference_split: str
    """Split of the data that is the reference."""
    n_reference: int
    """Number of reference images."""
    reference_sha256: str
    """Hash of the reference images."""
    seeds: list[int]
    """Seeds of the generated sets, one set each."""
    kid_subset_size: int | None
    """Number of images per subset of KID (None, here and below: the metric was not computed)."""
    kid_subsets: int | None
    """Number of subsets of KID."""
    kid_seed: int
    """Seed of KID's subsets, and of the order of images for IS."""
    prc_neighborhood: int | None = None
    """Precision and recall: the radius of an image's ball is the distance to its neighbor of this number."""
    isc_splits: int | None = None
    """Number of parts of the images over which IS is averaged."""
    sampler: dict[str, Any] = field(metadata=_ABOUT_THE_SETS)
    """Settings of the sampler that drew the refined sets."""
    nfe: float = field(metadata=_ABOUT_THE_SETS)
    """Network evaluations per refined image."""
    packages: dict[str, str] = field(metadata=_ABOUT_THE_SETS)
    """Versions of the packages that computed the metrics."""
    made: dict[str, Any] = field(default_factory=dict, metadata=_ABOUT_THE_SETS)
    """Other provenance of the images: run, hash of its weights, guidance, noise on x_hat; or the folder of images."""
    batch: int | None = field(default=None, metadata=_ABOUT_THE_SETS)
    """Images per forward pass of the extractor. Like `threads`, it affects features by rounding only."""
    threads: int | None = field(default=None, metadata=_ABOUT_THE_SETS)
    """CPU threads of each forward pass."""

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> EvaluationProtocol:
        """Parse the protocol in a summary.json. Raises UserError if a field is missing, unknown or of a wrong type."""
        names = {f.name for f in fields(cls)}
        if wrong := sorted(names ^ set(record)):
            raise UserError(
                f"protocol: field {wrong[0]!r} is {'missing' if wrong[0] in names else 'unknown'}: evaluate again"
            )
        try:
            return check(cls, dict(record), "protocol")
        except DamagedFile as error:
            raise UserError(f"{error}: evaluate again") from None


def compare(a: EvaluationProtocol, b: EvaluationProtocol) -> None:
    """Raise UserError unless results with the protocols `a` and `b` may be compared.

    The message names the first field that differs. The settings of a metric are ignored if one of the results does not
    have the metric (None). Some fields may differ:

    - Sampler, NFE and provenance describe how the images were drawn. Comparing these is the purpose.
    - Package versions, `batch` and `threads` change metrics by rounding only.
    """
    for f in fields(EvaluationProtocol):
        mine, other = getattr(a, f.name), getattr(b, f.name)
        if f.metadata.get("compared", True) and mine != other and None not in (mine, other):
            raise UserError(
                f"results cannot be compared: {f.name} is {mine!r} here and {other!r} there; evaluate both alike"
            )
