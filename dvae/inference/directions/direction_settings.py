"""Settings of tools/directions.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from dvae.inference.directions.direction import DirectionMethod


@dataclass(kw_only=True, slots=True)
class DirectionsConfig:
    """Settings of tools/directions.py."""

    run: str = MISSING
    """A run folder or a bundle."""
    find: list[DirectionMethod] = field(default_factory=list)
    """Methods to find directions with: labels, pca, jacobian. The directions are stored in the bundle."""
    labels: list[str] = field(default_factory=list)
    """Attributes to find directions for (empty: all)."""
    components: int = 8
    """Number of directions of pca, and of jacobian."""
    n_train: int = 20000
    """Maximum number of training images that directions are found from."""
    jacobians: int = 64
    """Number of training images at which the decoder's Jacobian is computed."""
    score: bool = False
    """Score directions on held-out images."""
    directions: list[str] = field(default_factory=list)
    """Names of the directions to score (empty: all)."""
    strengths: list[float] = field(default_factory=lambda: [0.75, 1.0, 1.5, 3.0])
    """Strengths to choose from. Directions of pca and jacobian are tried with both signs."""
    validation: int = 60
    """Number of held-out images on which the strength is chosen."""
    n: int = 150
    """Number of other held-out images, on which the scores are measured."""
    recognizer_steps: int = 2000
    """Training steps of the recognizer, which judges the edited images."""
    recognizer_batch: int = 64
    """Images per training step of the recognizer."""
    out: str = "directions.md"
    """File for the tables of scores. A JSON file with all figures and a picture with strips are written beside it."""
    shards: str = ""
    """Folder of shards with labeled images (empty: the shards that the run was trained on)."""
    seed: int = 0
    """Seed of the recognizer and of the noise of refinement."""
    batch: int = 64
    """Images per network call."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import. They register components."""
    sampler: Any = None
    """A sampler that replaces the run's sampler, or changed fields of the run's sampler."""


ConfigStore.instance().store(name="directions_schema", node=DirectionsConfig, provider="dvae")
