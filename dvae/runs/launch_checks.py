"""The checks of a launch. A dry run and a launch run the same ones, in the same order; nothing is written."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dvae.config import compose, stored, validate
from dvae.config.schema import RunConfig
from dvae.errors import UserError
from dvae.models.components import RunModels
from dvae.registry.launchers.base import DEFAULT, Launcher, launcher_of
from dvae.runs import folder, manage


@dataclass(frozen=True)
class CheckedLaunch:
    """A composed config that nothing speaks against, and what the checks have found."""

    config: RunConfig
    kept: dict[str, Any]
    """The settings as config.yaml will hold them."""
    launcher: Launcher
    models: RunModels
    """On the meta device."""
    images: dict[str, int]
    """Images by split; empty if the source is endless."""
    first: bool
    """Whether this process is rank 0, or the only one. The others leave the run folder to it."""
    under_way: bool
    """Whether this very run is under way, and the launcher can wait for it."""


def check_config(config: RunConfig) -> tuple[Launcher, RunModels, dict[str, int]]:
    """The launcher, the models on meta and the number of images by split. Raises UserError where one cannot work."""
    launcher = launcher_of(config.launcher)
    name = launcher.config.name
    if "RANK" in os.environ and name != DEFAULT:  # this is one of several ranks already
        raise UserError(f"launcher={name}: torchrun has started the ranks already: leave launcher={name} out")
    checked = validate.check(config, launcher.ranks)
    if importlib.util.find_spec("deepspeed") is None:  # which is imported when training begins
        raise ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed")
    return launcher, *checked


def check_launch(composed: DictConfig) -> CheckedLaunch:
    """Check settings, models, data and the run folder. Raises UserError, in one line, for the first that is wrong."""
    config = compose.to_run_config(composed)
    kept = stored.stored(composed)  # refuses secrets that would be written down
    launcher, models, images = check_config(config)
    first, under_way = os.environ.get("RANK", "0") == "0", False
    if first:
        folder.check_folder(composed)
        under_way = launcher.can_attach(Path(config.run))
        if not under_way:
            manage.refuse_busy(Path(config.run))
    return CheckedLaunch(config, kept, launcher, models, images, first, under_way)
