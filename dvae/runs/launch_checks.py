"""The checks before a launch. A dry run makes the same checks in the same order. Nothing is written."""

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
    """A composed config that has passed all checks, and the results of the checks."""

    config: RunConfig
    """The settings of the run."""
    kept: dict[str, Any]
    """The settings in the form in which config.yaml stores them."""
    launcher: Launcher
    """The launcher of the run."""
    models: RunModels
    """The models of the run, on the meta device."""
    images: dict[str, int]
    """Number of images by split. Empty if the source is endless."""
    first: bool
    """Whether this process is rank 0, or the only process. Only this process checks the run folder."""
    under_way: bool
    """Whether this run was already started, and the launcher can wait for it."""


def check_config(config: RunConfig) -> tuple[Launcher, RunModels, dict[str, int]]:
    """Check the settings, without the run folder.

    Returns the launcher, the models on the meta device, and the number of images by split. Raises UserError if the run
    cannot work.
    """
    launcher = launcher_of(config.launcher)
    name = launcher.config.name
    if "RANK" in os.environ and name != DEFAULT:  # this process is already one of several ranks
        raise UserError(f"launcher={name}: torchrun has started the ranks already: leave launcher={name} out")
    checked = validate.check(config, launcher.ranks)
    # DeepSpeed is imported only when training starts, which would be too late to report that it is missing.
    if importlib.util.find_spec("deepspeed") is None:
        raise ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed")
    return launcher, *checked


def check_launch(composed: DictConfig) -> CheckedLaunch:
    """Check settings, models, data and the run folder. Raises UserError for the first fault."""
    config = compose.to_run_config(composed)
    kept = stored.stored(composed)  # raises UserError for secrets that would be written to config.yaml
    launcher, models, images = check_config(config)
    first, under_way = os.environ.get("RANK", "0") == "0", False
    if first:
        run = folder.Run(Path(config.run))
        if run.config_file.exists():
            folder.refuse_other(run, composed)
            run.records()  # raises if the file is damaged
        under_way = launcher.can_attach(run.path)
        if not under_way:
            folder.check_folder(composed)
            manage.refuse_busy(run.path)
    return CheckedLaunch(config, kept, launcher, models, images, first, under_way)
