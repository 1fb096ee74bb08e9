"""What tools/directions.py takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from dvae.inference.directions.direction import DirectionMethod


@dataclass(kw_only=True, slots=True)
class DirectionsConfig:
    """What tools/directions.py takes."""

    run: str = MISSING
    """A run folder or a bundle."""
    find: list[DirectionMethod] = field(default_factory=list)
    """How to find directions, of labels, pca, jacobian; they are kept in the bundle."""
    labels: list[str] = field(default_factory=list)
    """Attributes to find directions for (empty: all)."""
    components: int = 8
    """Directions of pca and of jacobian, each."""
    n_train: int = 20000
    """Training images that directions are found from, at the most."""
    jacobians: int = 64
    """Training images at which the decoder's Jacobian is taken."""
    score: bool = False
    """Score directions on held-out images."""
    directions: list[str] = field(default_factory=list)
    """Names of those to score (empty: all)."""
    strengths: list[float] = field(default_factory=lambda: [0.75, 1.0, 1.5, 3.0])
    """Strengths to choose from; those of pca and jacobian are tried both ways."""
    validation: int = 60
    """Held-out images on which the strength is chosen."""
    n: int = 150
    """Other held-out images, on which the figures are taken."""
    recognizer_steps: int = 2000
    """Training steps of the judge."""
    recognizer_batch: int = 64
    """Images in each of them."""
    out: str = "directions.md"
    """The tables of the scores; all figures lie in a JSON file and some strips in a picture beside it."""
    shards: str = ""
    """Folder of labeled images (empty: the shards that the run was trained on)."""
    seed: int = 0
    """Seed of the judge and of the noise of refinement."""
    batch: int = 64
    """Images per network call."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import, which register components."""
    sampler: Any = None
    """Another sampler than the run's, or fields of the run's own."""


ConfigStore.instance().store(name="directions_schema", node=DirectionsConfig, provider="dvae")
