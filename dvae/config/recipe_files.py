"""Recipe files: the files in recipes/, recipes of users, and recipes of plug-ins."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hydra.core.config_store import ConfigStore

from dvae.errors import UserError, fold
from dvae.registry.discovery import RECIPE_FOLDERS
from dvae.utils import package
from dvae.utils.read import DamagedFile, read_yaml

RECIPES = package.FOLDER / "recipes"
_entered: dict[str, Path] = {}
"""Recipes of users, by the name with which Hydra selects them."""


def recipe_names(folder: str = "recipe") -> list[str]:
    """Return the names of the YAML files in a folder of recipes/, sorted.

    They are the valid values of recipe=, sweep= or study=. For the folder "recipe", the recipes of imported plug-ins
    are included.
    """
    folders = [RECIPES, *RECIPE_FOLDERS] if folder == "recipe" else [RECIPES]
    return sorted(path.stem for one in folders for path in (one / folder).glob("*.yaml"))


def file_of(word: str) -> Path | None:
    """Return the path in a word `recipe=PATH` of the command line. None for `recipe=NAME` and for other words."""
    key, _, value = word.partition("=")
    is_path = "/" in value or value.endswith((".yaml", ".yml"))
    return Path(os.path.expanduser(value)) if key == "recipe" and is_path else None


def read_recipe(path: Path) -> dict[str, object]:
    """Return the content of a user's recipe. Raises UserError if it cannot be read or is not valid."""
    try:
        content = read_yaml(path)
        defaults = content.get("defaults", [])
        if not isinstance(defaults, list) or not all(isinstance(entry, str | dict) for entry in defaults):
            raise DamagedFile(path, "has defaults that are no list of names such as `- override /refiner: unet_demo`")
        return content
    except DamagedFile as error:
        raise UserError(f"recipe={error}: correct the file, or copy one of {RECIPES / 'recipe'}") from None
    except OSError as error:
        raise UserError(
            f"recipe={path} cannot be read ({fold(error.strerror or error)}): name a file, or one of "
            f"{', '.join(recipe_names())}"
        ) from None


def enter_recipe(path: Path) -> str:
    """Add a user's recipe to Hydra's ConfigStore, and return the name with which Hydra selects it.

    The file has the format of the files in recipes/recipe/. The name of the recipe is the name of the file, unless the
    file has a field `recipe`.
    """
    content = read_recipe(path)
    content.setdefault("recipe", path.stem)
    # No recipe of dvae has a name with this prefix. Hydra's grammar takes only plain letters.
    name = "file_" + re.sub("[^A-Za-z0-9_]", "_", path.stem)
    ConfigStore.instance().store(group="recipe", name=name, node=content, package="_global_", provider="dvae")
    _entered[name] = path
    return name


def recipe_path(config: str) -> Path | None:
    """Return the file of a user's recipe, which Hydra calls recipe/NAME. None for other recipes."""
    return _entered.get(config.removeprefix("recipe/"))
