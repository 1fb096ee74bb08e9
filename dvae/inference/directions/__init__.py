"""Find, store and apply directions of the latent space (docs/directions.md).

dvae/evaluation/directions/ scores directions.
"""

from __future__ import annotations

from dvae.inference.directions.direction import Direction, DirectionMethod
from dvae.inference.directions.direction_files import load, names, save
from dvae.inference.directions.direction_settings import DirectionsConfig

__all__ = ["Direction", "DirectionMethod", "DirectionsConfig", "load", "names", "save"]
