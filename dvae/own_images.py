"""The images that a trained run was made from."""

from __future__ import annotations

from pathlib import Path

from dvae.config import endless
from dvae.data.manifest import FILE as MANIFEST
from dvae.data.reader import Shards
from dvae.data.remote import place_of
from dvae.errors import UserError
from dvae.settings import RunConfig
from dvae.tracking.console import say


def open_split(run: str, config: RunConfig, split: str, shards: str = "") -> Shards:
    """A split of the shards that a run was trained on, also where its folder was moved with them in it.

    `shards` names their folder where they lie elsewhere. Raises UserError where there are none, or none such.
    """
    if endless(config):
        raise UserError(f"run={run} was trained on points drawn without end, not on images: name another run")
    place = Path(shards) if shards else place_of(config.data)
    inside = Path(run) / "shards"
    if not shards and isinstance(place, Path) and not (place / MANIFEST).exists() and (inside / MANIFEST).exists():
        place = inside
    if isinstance(place, Path) and not (place / MANIFEST).exists():
        raise UserError(
            f"run={run} was trained on shards at {place}, which are not there: name them with shards=FOLDER"
        )
    opened = Shards(place, split, int(config.data.cache_gib * 2**30), config.data.max_bad_fraction, say)
    if opened.shape != (config.channels, config.image_size, config.image_size):
        size = "x".join(map(str, opened.shape))
        raise UserError(f"shards={place} are images of {size}, those of the run differ: name its own")
    return opened
