"""Find and open the images that a run was trained on."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from dvae.config.compose import refuse_points
from dvae.config.schema import DataConfig, ModelConfig
from dvae.data.shards.manifest import FILE as MANIFEST
from dvae.data.shards.reader import Shards
from dvae.data.shards.remote import RemoteShards, is_remote, locate_shards
from dvae.errors import UserError
from dvae.models import bundle
from dvae.runs.folder import Run
from dvae.tracking.console import say


def data_config(run: str) -> DataConfig | None:
    """Return the data settings of the run folder `run`; None for a bundle, which does not store them."""
    folder = Path(run)
    if not (folder / "config.yaml").exists() or (folder / bundle.INFO).exists():
        return None
    return Run(folder).config().data


def run_shards(run: str, config: ModelConfig, setting: str = "shards") -> Path:
    """Return the folder of the shards that a run was trained on.

    If the run folder was moved, the shards inside it are found too.

    Raises UserError if the shards are not on this machine, or if the run was trained on points. The message asks for
    the setting named `setting`.
    """
    refuse_points(config, run)
    data, inside = data_config(run), Path(run) / "shards"
    if data is None:
        more = "" if setting != "shards" else ", or give images=FOLDER (your own)"
        raise UserError(f"run={run} is a bundle and has no images: name the run's with {setting}=FOLDER{more}")
    if not is_remote(data.shards) and (Path(data.shards) / MANIFEST).exists():
        return Path(data.shards)
    if (inside / MANIFEST).exists():
        return inside
    # raises a UserError that says what to do, if the run's settings name a command or an address
    locate_shards(data.shards, data.download_to, data.download_gib)
    raise UserError(
        f"run={run} was trained on shards at {data.shards}, which are not there: name them with {setting}=FOLDER"
    )


def shards_location(shards: str, run: str) -> Path | RemoteShards:
    """Return the shards that a command names, a folder or an address.

    Downloaded files are kept in the run folder, or for a bundle in the user's cache folder.
    """
    if not is_remote(shards):
        return Path(shards)
    if (Path(run) / "remote").is_symlink():
        raise UserError(f"{Path(run) / 'remote'} is a link to another folder: remove it")
    user_cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "dvae/remote"
    download_to = Path(run) / "remote" if data_config(run) else user_cache
    return locate_shards(shards, str(download_to.expanduser()), DataConfig().download_gib)


def open_split(run: str, config: ModelConfig, split: str, shards: str = "") -> Shards:
    """Open a split of the shards that a run was trained on, or of `shards` if it is given.

    Raises UserError if the shards are not found, if they have no such split, or if their images have another size than
    the run's images.
    """
    data = data_config(run) or replace(DataConfig(), shards=shards)
    place = shards_location(shards, run) if shards else run_shards(run, config)
    opened = Shards(place, split, int(data.cache_gib * 2**30), data.max_bad_fraction, say)
    if opened.shape != (config.channels, config.image_size, config.image_size):
        size = "x".join(map(str, opened.shape))
        raise UserError(f"shards={place} has images of {size}, another size than the run's: name the run's own shards")
    return opened
