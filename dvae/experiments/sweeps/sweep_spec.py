"""A W&B sweep file: found, checked, and its command made into overrides for tools/launch.py."""

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
"""Overrides in a command that suit W&B's agent: here trials have a folder of the sweep's, and need no server."""
PROGRAM = "tools/launch.py"


@dataclass(frozen=True)
class SweepSpec:
    """A sweep file that W&B's schema and the recipe accept."""

    name: str
    """That of the file."""
    sweep: dict[str, Any]
    """The file."""

    @property
    def metric(self) -> str:
        return str(self.sweep["metric"]["name"])

    @property
    def minimizes(self) -> bool:
        return bool(self.sweep["metric"].get("goal", "minimize") == "minimize")  # W&B's default

    def command(self, parameters: Mapping[str, Any], overrides: Iterable[str]) -> list[str]:
        """The process of a trial: the file's command with these parameters and further overrides, which come last.

        What the file says for W&B's agent alone (SERVER_ONLY) is left out.
        """
        chunks = expand(self.sweep["command"], self.sweep["program"], parameters)
        start = chunks.index(program(self.sweep["program"])) + 1
        given = {key(word): word for word in chunks[start:] if key(word) not in SERVER_ONLY}
        given |= {key(word): word for word in overrides}
        return [*chunks[:start], *given.values()]

    def overrides(self, parameters: Mapping[str, Any], overrides: Iterable[str]) -> list[str]:
        """What `command` gives tools/launch.py."""
        chunks = self.command(parameters, overrides)
        return chunks[chunks.index(program(self.sweep["program"])) + 1 :]


def key(word: str) -> str:
    """The field that an override sets: `+a.b=1` and `~a.b` set a.b."""
    return word.lstrip("+~").partition("=")[0]


def load(name: str) -> SweepSpec:
    """The sweep `name` of recipes/sweep, or in a file. Raises UserError where there is none or it cannot work here."""
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
    """Refuse what W&B refuses, and what only its server can do. Raises UserError, one line."""
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
            raise UserError(f"sweep={name}: it has no {wanted}: copy that of {recipe_names('sweep')[0]}.yaml")
    nested = [parameter for parameter, given in sweep["parameters"].items() if "parameters" in given]
    if nested:
        raise UserError(f"sweep={name}: parameter {nested[0]!r} is nested: write its fields with dots, a.b")
    expand(sweep["command"], sweep["program"], {})
    return sweep


def check_first_trial(spec: SweepSpec, overrides: list[str]) -> RunConfig:
    """The settings of the first trial, before anything is written. Raises UserError where the recipe refuses it."""
    swept = [word for word in overrides if key(word) in spec.sweep["parameters"]]
    if swept:
        raise UserError(f"{swept[0]}: the sweep chooses {key(swept[0])}: leave it out")
    parameters = sweep_engine.propose(spec.sweep, [])
    assert parameters is not None  # a grid has a first point
    settings = configuration.to_run_config(configuration.compose("train", spec.overrides(parameters, overrides)))
    training = spec.metric.partition("/")[0]  # a stage may have several trainings, NAME-32
    if stage_of(training) not in settings.stages:
        raise UserError(
            f"metric {spec.metric!r} is no figure of the stages {', '.join(settings.stages)}: "
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
    """What W&B's agent makes of a command: macros, and ${envvar:NAME} inside of words. Raises UserError for others."""
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
        raise UserError("command: it needs ${program} and ${args_no_hyphens}, for Hydra takes no --name=value")
    return chunks


def program(name: str) -> str:
    """The program of a sweep; tools/launch.py is that of this package where there is none in the working folder."""
    return str(package.FOLDER / name) if name == PROGRAM and not Path(name).is_file() else name
