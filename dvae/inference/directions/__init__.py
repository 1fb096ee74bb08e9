"""Directions: vectors of the latent space with a name, that change something of an image; see docs/directions.md."""

from __future__ import annotations

from dvae.inference.directions.direction import Direction, DirectionMethod
from dvae.inference.directions.direction_files import load, names, save
from dvae.inference.directions.direction_settings import DirectionsConfig

__all__ = ["Direction", "DirectionMethod", "DirectionsConfig", "load", "names", "save"]
