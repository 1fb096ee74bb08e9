"""Read summary.json, which describes a run and the results of its evaluation. The evaluate stage writes it.

The file is {"recipe", "stages": {name: StageRecord}, "evaluation": Evaluation, "figures": {name: number or null}}.
Other keys are ignored.
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
    """Duration and size of a finished stage. Any value may be missing or null."""

    seconds: Seconds | None = None
    """Duration in seconds."""
    steps: Count | None = None
    """Number of training steps."""
    images_per_second: float | None = None
    """Training images per second."""
    parameters: Count | None = None
    """Number of parameters of the model."""


@dataclass
class Figure:
    """A metric over several seeds."""

    mean: float
    """Mean over the seeds."""
    se: float | None = None
    """Standard error of the mean; null for one seed."""
    per_seed: list[float] = field(default_factory=list)
    """The value of each seed."""


@dataclass
class SetFigures:
    """Metrics of a set of images. Other metrics in the file are ignored here."""

    n: Count | None = None
    """Number of images in the set."""
    n_reference: Count | None = None
    """Number of real images in the reference set."""
    kid: Annotated[Figure | None, Field(alias="KID-lite0")] = None
    """KID-lite0 to the reference set."""
    fid: Annotated[Figure | None, Field(alias="FID-lite0")] = None
    """FID-lite0 to the reference set."""


@dataclass
class ReconstructionFigures:
    """The quality of the VAE's reconstructions."""

    n: Count
    """Number of images."""
    psnr: float
    """Mean PSNR in dB."""
    latent: list[Count]
    """Shape of the latent of one image."""


@dataclass
class ClassOfPoints:
    """Distances for the points of one class."""

    sliced_wasserstein: Figure
    """Sliced Wasserstein distance between drawn and true points."""
    floor: Figure
    """The same distance between two sets of true points."""


@dataclass
class PointFigures:
    """Results of the evaluation of a run on points."""

    classes: dict[str, ClassOfPoints] | None = None
    """Distances by class."""


@dataclass
class Evaluation:
    """Results of the evaluation. Any entry may be missing or null."""

    protocol: dict[str, Any] | None = None
    """Settings of the evaluation."""
    sets: dict[str, SetFigures] | None = None
    """Metrics of each set of images: samples and reconstructions."""
    floor: dict[str, SetFigures] | None = None
    """Metrics of sets of real images, as a reference value."""
    reconstructions: ReconstructionFigures | None = None
    """Quality of the reconstructions."""
    points: PointFigures | None = None
    """Results of a run on points."""


@dataclass
class Summary:
    """The content of summary.json. Any entry may be missing or null."""

    recipe: str | None = None
    """Name of the recipe."""
    stages: dict[str, StageRecord] | None = None
    """Records of the finished stages, by name."""
    evaluation: Evaluation | None = None
    """Results of the evaluation."""
    figures: dict[str, Number | None] | None = None
    """Metrics of the evaluation by the names that W&B uses (see dvae/tracking/figures.py)."""


def read_summary(path: Path) -> Summary:
    """Read summary.json. Returns an empty Summary if the file is missing, and raises DamagedFile if it is damaged."""
    return read_json(path, Summary) if path.exists() else Summary()
