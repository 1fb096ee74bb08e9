"""Directions: vectors of the latent space with a name, that change something of an image; see docs/directions.md."""

from __future__ import annotations

from dvae.directions.direction import Direction, Method
from dvae.directions.settings import DirectionsConfig
from dvae.directions.store import load, names, save

__all__ = ["Direction", "DirectionsConfig", "Method", "load", "names", "save"]
