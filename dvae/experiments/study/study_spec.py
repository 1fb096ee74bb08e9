"""The settings of a study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dvae.config.compose import mistyped
from dvae.config.recipe_files import RECIPES, recipe_names
from dvae.errors import UserError, suggest
from dvae.utils.read import DamagedFile
from dvae.utils.user_yaml import read_user_yaml


@dataclass(kw_only=True, slots=True)
class StudyConfig:
    """Settings of tools/study.py."""

    out: str = "runs/study"
    """Folder of the study. It must be missing, empty, or hold the same study."""
    recipe: str = "demo"
    """Recipe of every run. It must have an encoder and refine pixels. An arm may override its sampler."""
    overrides: list[str] = field(default_factory=list)
    """Overrides of every run, as in tools/launch.py."""
    arms: dict[str, list[str]] = field(default_factory=dict)
    """Further overrides of each arm. An arm uses the seed's encoder and trains a refiner, unless it sets stages=[...].
    teacher=ARM names an earlier arm whose run is the teacher."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds for both training and sampling."""
    steps: list[int] = field(default_factory=lambda: [5, 10, 25, 50, 100])
    """Numbers of sampler steps, 1 or more each."""
    n: int = 500
    """Images per arm, seed and number of steps. At least kid_subset_size."""
    n_reference: int = 4000
    """Maximum number of training images to compare with."""
    kid_subset_size: int = 100
    """Images in each subset of KID."""
    kid_subsets: int = 100
    """Number of subsets of KID."""
    batch: int = 64
    """Images per network call."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import, which register components."""


STAGES = ("shards", "encoder", "prior", "refiner")
"""Stages of an arm that does not set stages=[...]."""

GENERATOR = "generator"
"""Name of the folder for a seed's encoder run. It lies beside the folders of the arms."""


def read_study(argv: Sequence[str]) -> StudyConfig:
    """Read the study that study=NAME (in recipes/study) or study=FILE.yaml names.

    The other arguments set fields of StudyConfig. Raises UserError for an unknown study or field, or a value of the
    wrong type.
    """
    known = [field.name for field in fields(StudyConfig)]
    given = {word.partition("=")[0]: word.partition("=")[2] for word in argv}
    for word in argv:
        if "=" not in word or word.partition("=")[0] not in ("study", *known):
            raise UserError(f"{word}: {suggest(word.partition('=')[0], ['study', *known])}")
    file = study_file(given.pop("study", "avatars"))
    try:
        fields_given = OmegaConf.from_dotlist([f"{name}={value}" for name, value in given.items()])
        merged = OmegaConf.merge(OmegaConf.structured(StudyConfig), read_user_yaml(file), fields_given)
        settings: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise mistyped(error) from None
    except DamagedFile as error:
        raise UserError(f"study={error}") from None
    return check(settings)


def study_file(name: str) -> Path:
    """Return the path of a study's file. Raises UserError if it does not exist."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(f"study={name}: no such file")
        return Path(name)
    names = recipe_names("study")
    if name not in names:
        raise UserError(f"study={name}: {suggest(name, names)}, or give a YAML file")
    return RECIPES / "study" / f"{name}.yaml"


def check(settings: StudyConfig) -> StudyConfig:
    """Return `settings`. Raises UserError if a value is invalid or the arms cannot be compared."""
    if not settings.arms:
        raise UserError("arms={} names nothing to compare: use study=NAME, or give two or more")
    if nameless := [arm for arm in settings.arms if not folder_name(arm)]:
        raise UserError(f"arms: {nameless[0]!r} is not a valid folder name: use letters and digits")
    if len({folder_name(arm) for arm in [*settings.arms, GENERATOR]}) <= len(settings.arms):
        raise UserError(
            f"arms={list(settings.arms)}: two names give the same folder, or one is {GENERATOR!r}: use other names"
        )
    for number, (arm, overrides) in enumerate(settings.arms.items()):
        earlier = list(settings.arms)[:number]
        for teacher in values_of(overrides, "teacher"):
            if teacher not in earlier:
                raise UserError(f"arm {arm!r}: teacher={teacher} is not an earlier arm: {suggest(teacher, earlier)}")
    for name in ("seeds", "steps"):
        values = getattr(settings, name)
        if not values or len(set(values)) < len(values):
            raise UserError(f"{name}={values}: give one or more, each once")
    for name in ("n", "n_reference", "kid_subset_size", "kid_subsets", "batch"):
        if getattr(settings, name) < 1:
            raise UserError(f"{name}={getattr(settings, name)}: use 1 or more")
    if min(settings.steps) < 1:
        raise UserError(f"steps={settings.steps}: use 1 or more")
    if settings.n < settings.kid_subset_size:
        raise UserError(f"n={settings.n} is less than kid_subset_size={settings.kid_subset_size}: use more images")
    return settings


def folder_name(arm: str) -> str:
    """Convert an arm's name to a folder name: lower case, with words of letters and digits joined by hyphens."""
    return "-".join("".join(c if c.isalnum() else " " for c in arm.lower()).split())


def shards(settings: StudyConfig) -> Path:
    """Return the folder of the image shards, which all runs share."""
    return Path(settings.out) / "shards"


def run_folder(settings: StudyConfig, arm: str, seed: int) -> Path:
    """Return the folder of an arm's run with this seed."""
    return Path(settings.out) / f"seed-{seed}" / folder_name(arm)


def values_of(overrides: Sequence[str], name: str) -> list[str]:
    """Return all values that `overrides` give to the field `name`, in order."""
    return [word.partition("=")[2] for word in overrides if word.partition("=")[0] == name]


def arm_stages(settings: StudyConfig, arm: str) -> tuple[str, ...]:
    """Return the stages of an arm's run."""
    own = values_of(settings.arms[arm], "stages")
    return tuple(own[-1].strip("[]").split(",")) if own else STAGES


def arm_overrides(settings: StudyConfig, arm: str, seed: int) -> list[str]:
    """Return the overrides of an arm's run for tools/launch.py, without the overrides of all runs and the stages."""
    overrides = [f"seed={seed}", f"data.shards={shards(settings)}"]
    if "encoder" in arm_stages(settings, arm):
        overrides.append(f"encoder_weights={run_folder(settings, GENERATOR, seed)}")
    for word in settings.arms[arm]:
        name, _, value = word.partition("=")
        if name != "stages":
            overrides.append(f"teacher={run_folder(settings, value, seed)}" if name == "teacher" else word)
    return overrides
