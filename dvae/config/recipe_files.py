"""The files of the folder recipes/: recipes, sweeps, studies, and the settings of tools."""

from __future__ import annotations

from dvae.utils import package

RECIPES = package.FOLDER / "recipes"


def recipe_names(folder: str = "recipe") -> list[str]:
    """The names of the YAML files in a folder of recipes/, sorted: what recipe=, sweep= or study= takes."""
    return sorted(path.stem for path in (RECIPES / folder).glob("*.yaml"))
