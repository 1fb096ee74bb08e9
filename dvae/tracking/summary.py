"""summary.json: what a run is made of and what its evaluation measured. The evaluate stage writes it.

{"recipe", "stages": {name: StageRecord}, "evaluation": Evaluation, "figures": {name: number or null}}; other keys are
passed over.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dvae.utils.number_types import Count, Number, Seconds
from dvae.utils.read import read_json


@dataclass
class StageRecord:
    """What is worth knowing of a finished stage; any of it may be missing or null."""

    seconds: Seconds | None = None
    steps: Count | None = None
    images_per_second: float | None = None
    parameters: Count | None = None


@dataclass
class Figure:
    """One figure over several seeds."""

    mean: float
    se: float | None = None
    """Standard error; null for one seed."""
    per_seed: list[float] = field(default_factory=list)


@dataclass
class SetFigures:
    """Figures of a set of images; others than these are not shown."""

    n: Count | None = None
    n_reference: Count | None = None
    kid: Annotated[Figure | None, Field(alias="KID-lite0")] = None
    fid: Annotated[Figure | None, Field(alias="FID-lite0")] = None


@dataclass
class ReconstructionFigures:
    """How faithful reconstructions are."""

    n: Count
    psnr: float
    latent: list[Count]


@dataclass
class ClassOfPoints:
    """Distances of the points of one class."""

    sliced_wasserstein: Figure
    floor: Figure


@dataclass
class PointFigures:
    """What the evaluation of a run on points found."""

    classes: dict[str, ClassOfPoints] | None = None


@dataclass
class Evaluation:
    """What dvae.evaluation found; any of it may be missing or null."""

    protocol: dict[str, Any] | None = None
    sets: dict[str, SetFigures] | None = None
    floor: dict[str, SetFigures] | None = None
    reconstructions: ReconstructionFigures | None = None
    points: PointFigures | None = None


@dataclass
class Summary:
    """The file; any of it may be missing or null."""

    recipe: str | None = None
    stages: dict[str, StageRecord] | None = None
    evaluation: Evaluation | None = None
    figures: dict[str, Number | None] | None = None


def read_summary(path: Path) -> Summary:
    """What a summary.json holds; nothing if there is no file. Raises DamagedFile for any other file."""
    return read_json(path, Summary) if path.exists() else Summary()
