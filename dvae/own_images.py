"""The images that a trained run was made from."""

from __future__ import annotations

from pathlib import Path

from dvae.config import endless
from dvae.data.manifest import FILE as MANIFEST
from dvae.data.reader import Shards
from dvae.data.remote import Remote, place_of
from dvae.errors import UserError
from dvae.settings import RunConfig
from dvae.tracking.console import say


def place_of_run(run: str, config: RunConfig, word: str = "shards") -> Path | Remote:
    """The shards that a run was trained on, also where its folder was moved with them in it.

    Raises UserError, which asks for the word `word`, where they are not on this machine; and for a run on points.
    """
    if endless(config):
        raise UserError(f"run={run} was trained on points drawn without end, not on images: name another run")
    place, inside = place_of(config.data), Path(run) / "shards"
    if not isinstance(place, Path) or (place / MANIFEST).exists():
        return place
    if (inside / MANIFEST).exists():
        return inside
    raise UserError(f"run={run} was trained on shards at {place}, which are not there: name them with {word}=FOLDER")


def open_split(run: str, config: RunConfig, split: str, shards: str = "") -> Shards:
    """A split of those shards; `shards` names their folder where they lie elsewhere.

    Raises UserError as `place_of_run`, where there is no such split, and for images of another size than the run's.
    """
    place = Path(shards) if shards else place_of_run(run, config)
    opened = Shards(place, split, int(config.data.cache_gib * 2**30), config.data.max_bad_fraction, say)
    if opened.shape != (config.channels, config.image_size, config.image_size):
        size = "x".join(map(str, opened.shape))
        raise UserError(f"shards={place} are images of {size}, those of the run differ: name its own")
    return opened
