"""The protocol of a measurement: what must agree before two figures may stand side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dvae.errors import UserError
from dvae.utils.read import DamagedFile, check

_ABOUT_THE_SETS = {"compared": False}


@dataclass(frozen=True, kw_only=True)
class EvaluationProtocol:
    """How sets of images were scored. Goes with every figure; `dataclasses.asdict` makes it JSON-ready."""

    backend: str
    """Package that computes the metrics, with its version."""
    extractor: str
    """Network whose features are compared."""
    weights_sha256: str
    """Hash of the extractor's weights."""
    resize: str
    """How images are brought to the extractor's size."""
    image_size: int
    """Height and width of the images, in pixels."""
    n: int
    """Images per set and seed."""
    reference_split: str
    """Split of the data that sets are compared with."""
    n_reference: int
    """Images of the reference."""
    reference_sha256: str
    """Hash of the reference images."""
    seeds: list[int]
    """Seeds of the generated sets, one set each."""
    kid_subset_size: int | None
    """Images per subset of KID (null here and below: it was not computed)."""
    kid_subsets: int | None
    """Subsets of KID."""
    kid_seed: int
    """Seed that draws KID's subsets, and the order of images for IS."""
    prc_neighborhood: int | None = None
    """Neighbors that a ball of precision and recall reaches to."""
    isc_splits: int | None = None
    """Parts of the images that IS is a mean over."""
    sampler: dict[str, Any] = field(metadata=_ABOUT_THE_SETS)
    """Config of the sampler that made the refined sets."""
    nfe: float = field(metadata=_ABOUT_THE_SETS)
    """Network evaluations per refined image."""
    packages: dict[str, str] = field(metadata=_ABOUT_THE_SETS)
    """Versions of the packages at work."""
    made: dict[str, Any] = field(default_factory=dict, metadata=_ABOUT_THE_SETS)
    """What else decides how images were made: run, hash of its weights, guidance, noise on x_hat, or their folder."""
    batch: int | None = field(default=None, metadata=_ABOUT_THE_SETS)
    """Images per pass of the extractor; like the next, it moves features by rounding only."""
    threads: int | None = field(default=None, metadata=_ABOUT_THE_SETS)
    """Threads of the CPU that each pass took."""

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> EvaluationProtocol:
        """The protocol kept in a summary.json. Raises UserError if a field is lacking, unknown or of another type."""
        names = {f.name for f in fields(cls)}
        if wrong := sorted(names ^ set(record)):
            raise UserError(
                f"protocol: field {wrong[0]!r} is {'lacking' if wrong[0] in names else 'unknown'}: evaluate again"
            )
        try:
            return check(cls, dict(record), "protocol")
        except DamagedFile as error:
            raise UserError(f"{error}: evaluate again") from None


def compare(a: EvaluationProtocol, b: EvaluationProtocol) -> None:
    """Raises UserError, naming the first field that differs, unless figures under `a` and `b` may be compared.

    The setting of a metric that was not computed on both sides (null) decides nothing. Sampler, NFE and package
    versions are recorded but may differ: they say how the images were made, which is what one compares, or (torch) move
    figures by rounding only.
    """
    for f in fields(EvaluationProtocol):
        mine, other = getattr(a, f.name), getattr(b, f.name)
        if f.metadata.get("compared", True) and mine != other and None not in (mine, other):
            raise UserError(
                f"results cannot be compared: {f.name} is {mine!r} here and {other!r} there; evaluate both alike"
            )
