"""What a study is."""

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
    """What tools/study.py takes."""

    out: str = "runs/study"
    """Folder of the study: it must not exist yet, be empty, or hold this same study."""
    recipe: str = "demo"
    """Recipe of every run; it must have an encoder, and refine pixels. Arms are drawn by its sampler or their own."""
    overrides: list[str] = field(default_factory=list)
    """Overrides of every run, as tools/launch.py takes them."""
    arms: dict[str, list[str]] = field(default_factory=dict)
    """Further overrides of each arm, which takes a seed's encoder and trains a refiner, or has stages=[...] of its own;
    teacher=ARM is the run of an arm before it."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds, of training and of samples both."""
    steps: list[int] = field(default_factory=lambda: [5, 10, 25, 50, 100])
    """Steps of the sampler."""
    n: int = 500
    """Images per arm, seed and number of steps."""
    n_reference: int = 4000
    """Training images that sets are compared with (fewer where there are fewer)."""
    kid_subset_size: int = 100
    """Images per subset of KID."""
    kid_subsets: int = 100
    """Subsets of KID."""
    batch: int = 64
    """Images per network call."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import, which register components."""


STAGES = ("shards", "encoder", "prior", "refiner")
"""Of an arm that names none."""

GENERATOR = "generator"
"""Folder, beside those of the arms, of the run that trains a seed's encoder."""


def read_study(argv: Sequence[str]) -> StudyConfig:
    """The study of study=NAME (recipes/study) or study=FILE.yaml, with fields set by the other arguments.

    Raises UserError for an unknown study or field, or a value of the wrong type.
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
    """The file of a study. Raises UserError where there is none."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(f"study={name}: no such file")
        return Path(name)
    names = recipe_names("study")
    if name not in names:
        raise UserError(f"study={name}: {suggest(name, names)}, or give a YAML file")
    return RECIPES / "study" / f"{name}.yaml"


def check(settings: StudyConfig) -> StudyConfig:
    """Refuse what cannot be compared. Raises UserError."""
    if not settings.arms:
        raise UserError("arms={} names nothing to compare: use study=NAME, or give two or more")
    if nameless := [arm for arm in settings.arms if not folder_name(arm)]:
        raise UserError(f"arms: {nameless[0]!r} is no name for a folder: use letters and digits")
    if len({folder_name(arm) for arm in [*settings.arms, GENERATOR]}) <= len(settings.arms):
        raise UserError(f"arms={list(settings.arms)}: two names are too much alike, or one is {GENERATOR!r}")
    for number, (arm, overrides) in enumerate(settings.arms.items()):
        earlier = list(settings.arms)[:number]
        for teacher in values_of(overrides, "teacher"):
            if teacher not in earlier:
                raise UserError(f"arm {arm!r}: teacher={teacher} is no arm before it: {suggest(teacher, earlier)}")
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
    """An arm's name as that of a folder."""
    return "-".join("".join(c if c.isalnum() else " " for c in arm.lower()).split())


def shards(settings: StudyConfig) -> Path:
    """Folder of the images, which all runs have in common."""
    return Path(settings.out) / "shards"


def run_folder(settings: StudyConfig, arm: str, seed: int) -> Path:
    """Folder of an arm's run."""
    return Path(settings.out) / f"seed-{seed}" / folder_name(arm)


def values_of(overrides: Sequence[str], name: str) -> list[str]:
    """The values that some overrides give to `name`."""
    return [word.partition("=")[2] for word in overrides if word.partition("=")[0] == name]


def arm_stages(settings: StudyConfig, arm: str) -> tuple[str, ...]:
    """The stages of an arm's run."""
    own = values_of(settings.arms[arm], "stages")
    return tuple(own[-1].strip("[]").split(",")) if own else STAGES


def arm_overrides(settings: StudyConfig, arm: str, seed: int) -> list[str]:
    """What tools/launch.py takes for an arm's run, besides the overrides of all runs and the stages."""
    overrides = [f"seed={seed}", f"data.shards={shards(settings)}"]
    if "encoder" in arm_stages(settings, arm):
        overrides.append(f"encoder_weights={run_folder(settings, GENERATOR, seed)}")
    for word in settings.arms[arm]:
        name, _, value = word.partition("=")
        if name != "stages":
            overrides.append(f"teacher={run_folder(settings, value, seed)}" if name == "teacher" else word)
    return overrides
