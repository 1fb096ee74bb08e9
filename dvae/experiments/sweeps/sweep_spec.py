"""Find and check a W&B sweep file, and convert its command to overrides for tools/launch.py."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvae.config import compose as configuration
from dvae.config.recipe_files import RECIPES, recipe_names
from dvae.config.schema import RunConfig
from dvae.config.stage_names import stage_of
from dvae.errors import UserError, fold, suggest
from dvae.experiments.sweeps import sweep_engine
from dvae.registry.stages.base import STAGES
from dvae.tracking.figures import EVALUATE
from dvae.utils import package
from dvae.utils.read import DamagedFile
from dvae.utils.user_yaml import read_user_yaml

SERVER_ONLY = ("run", "tracking.wandb.mode")
"""Overrides in a sweep file's command that are only for W&B's agent and are left out here.

Here trials run in the sweep's folder and need no W&B server.
"""
PROGRAM = "tools/launch.py"


@dataclass(frozen=True)
class SweepSpec:
    """A checked sweep file."""

    name: str
    """Name of the file without its suffix."""
    sweep: dict[str, Any]
    """Contents of the file."""

    @property
    def metric(self) -> str:
        return str(self.sweep["metric"]["name"])

    @property
    def minimizes(self) -> bool:
        return bool(self.sweep["metric"].get("goal", "minimize") == "minimize")  # W&B's default

    def command(self, parameters: Mapping[str, Any], overrides: Iterable[str]) -> list[str]:
        """Return the command line of a trial: the file's command with these parameters, then the overrides.

        An override replaces an earlier one of the same field. The fields in SERVER_ONLY are left out of the file's
        command.
        """
        chunks = expand(self.sweep["command"], self.sweep["program"], parameters)
        start = chunks.index(program(self.sweep["program"])) + 1
        given = {key(word): word for word in chunks[start:] if key(word) not in SERVER_ONLY}
        given |= {key(word): word for word in overrides}
        return [*chunks[:start], *given.values()]

    def overrides(self, parameters: Mapping[str, Any], overrides: Iterable[str]) -> list[str]:
        """Return the arguments that `command` passes to tools/launch.py."""
        chunks = self.command(parameters, overrides)
        return chunks[chunks.index(program(self.sweep["program"])) + 1 :]


def key(word: str) -> str:
    """Return the field that an override sets, such as a.b for `+a.b=1` and `~a.b`."""
    return word.lstrip("+~").partition("=")[0]


def load(name: str) -> SweepSpec:
    """Load the sweep `name` from recipes/sweep, or from a YAML file.

    Raises UserError if it does not exist, cannot be read, or is not valid here.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"sweep={name}: no such file; the sweeps here are {', '.join(recipe_names('sweep'))}")
    elif name in recipe_names("sweep"):
        path = RECIPES / "sweep" / f"{name}.yaml"
    else:
        raise UserError(f"unknown sweep {name!r}: {suggest(name, recipe_names('sweep'))}")
    try:
        sweep = read_user_yaml(path, "yaml")
    except (OSError, DamagedFile) as error:
        reason = fold(error).removeprefix(f"{path}: ")
        raise UserError(f"sweep={name}: not a readable YAML file ({reason})") from None
    return SweepSpec(Path(name).stem, check(name, sweep))


def check(name: str, sweep: Any) -> dict[str, Any]:
    """Return the contents of a sweep file if they are valid.

    Raises a one-line UserError if W&B's schema refuses the file, or if only W&B's server supports it.
    """
    if not isinstance(sweep, dict):
        raise UserError(f"sweep={name}: not a sweep: a mapping with method, metric, parameters and command is one")
    parameters = sweep.get("parameters")
    if not isinstance(parameters, dict):
        raise UserError(f"sweep={name}: parameters is {parameters!r:.80}: name fields, and what they may be")
    wrong = sweep_engine.violations(sweep)
    if wrong:
        raise UserError(f"sweep={name}: W&B's schema refuses it: {'; '.join(wrong)}")
    if sweep["method"] not in sweep_engine.METHODS:
        raise UserError(f"sweep={name}: method: {sweep['method']}: {suggest(sweep['method'], sweep_engine.METHODS)}")
    if not (sweep.get("metric") or {}).get("name"):
        raise UserError(f"sweep={name}: it names no metric to optimize: add metric: {{name: refiner/loss}}")
    for wanted in ("program", "command"):
        if not sweep.get(wanted):
            raise UserError(f"sweep={name}: it has no {wanted}: copy the one of {recipe_names('sweep')[0]}.yaml")
    nested = [parameter for parameter, given in sweep["parameters"].items() if "parameters" in given]
    if nested:
        raise UserError(f"sweep={name}: parameter {nested[0]!r} is nested: write its fields with dots, a.b")
    expand(sweep["command"], sweep["program"], {})
    return sweep


def check_first_trial(spec: SweepSpec, overrides: list[str]) -> RunConfig:
    """Compose the settings of the first trial before anything is written, and return them.

    Raises UserError if the recipe refuses the settings, an override sets a swept parameter, or the metric is not one of
    the recipe's.
    """
    swept = [word for word in overrides if key(word) in spec.sweep["parameters"]]
    if swept:
        raise UserError(f"{swept[0]}: the sweep chooses {key(swept[0])}: leave it out")
    parameters = sweep_engine.propose(spec.sweep, [])
    assert parameters is not None  # a grid has a first point
    settings = configuration.to_run_config(configuration.compose("train", spec.overrides(parameters, overrides)))
    training = spec.metric.partition("/")[0]  # a stage may have several trainings, NAME-32
    if stage_of(training) not in settings.stages:
        raise UserError(
            f"metric {spec.metric!r} is not measured by the stages {', '.join(settings.stages)}: "
            f"name one like refiner/loss or {EVALUATE}/reconstructions/psnr"
        )
    # hyperband compares trials by step, and only trainings have metrics by step
    if "early_terminate" in spec.sweep and stage_of(training) not in STAGES.trained():
        raise UserError(
            f"early_terminate: {spec.metric!r} is known at a trial's end only: name a metric of a stage that trains, "
            "such as refiner/loss, or leave early_terminate out"
        )
    return settings


def expand(command: list[Any], program_: str, parameters: Mapping[str, Any]) -> list[str]:
    """Expand a command as W&B's agent does: replace the macros, and ${envvar:NAME} inside words.

    Raises UserError for an unknown macro, or if the command lacks ${program} or ${args_no_hyphens}.
    """
    macros = {
        "${env}": ["/usr/bin/env"],
        "${interpreter}": [sys.executable],
        "${program}": [program(program_)],
        "${args_no_hyphens}": [f"{name}={value}" for name, value in parameters.items()],
    }
    chunks: list[str] = []
    for chunk in map(str, command):
        if chunk in macros:
            chunks += macros[chunk]
            continue
        whole = re.sub(r"\$\{envvar:([A-Z0-9_]*)\}", lambda found: os.environ.get(found[1], found[1]), chunk)
        if whole.startswith("${") and whole.endswith("}"):
            raise UserError(f"command: {chunk}: {suggest(chunk, macros)}")
        chunks.append(whole)
    if program(program_) not in chunks or "${args_no_hyphens}" not in map(str, command):
        raise UserError("command: it needs ${program} and ${args_no_hyphens}, as Hydra does not accept --name=value")
    return chunks


def program(name: str) -> str:
    """Return the path of a sweep's program.

    If tools/launch.py does not exist in the working folder, this is the one of the package.
    """
    return str(package.FOLDER / name) if name == PROGRAM and not Path(name).is_file() else name
