"""Directions of the latent space: find, store and apply them (docs/directions.md).

dvae/evaluation/directions/ scores them.
"""

from __future__ import annotations

from dvae.inference.directions.direction import Direction, DirectionMethod
from dvae.inference.directions.direction_files import load, names, save
from dvae.inference.directions.direction_settings import DirectionsConfig

__all__ = ["Direction", "DirectionMethod", "DirectionsConfig", "load", "names", "save"]
