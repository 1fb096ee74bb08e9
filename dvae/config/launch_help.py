"""The help of tools/launch.py: settings of a run, stages, components and recipes.

It is read from the source files, without importing them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from dvae.config.command_line import settings_table, table_rows
from dvae.utils.class_fields import ClassSource, FieldText, fields_of, find_class, find_in
from dvae.utils.package import FOLDER
from dvae.utils.registered_names import component_folders, registered_in

SCHEMA = "dvae.config.schema"


def launch_sections() -> str:
    """Return the sections of the help that list settings, stages, components and recipes."""
    sections = {
        "Settings of a run": settings_table(run_fields()),
        "Settings of each stage that trains, such as train_refiner.steps=20000": settings_table(training_fields()),
        "Stages, with their own settings": "\n".join(_stages()),
        "Components and presets (`python tools/components.py KIND NAME` shows the fields)": "\n".join(_components()),
        "Recipes": "\n".join(_listed(yaml_names("recipe"))),
    }
    return "\n\n".join(f"{heading}:\n{text}" for heading, text in sections.items())


def run_fields() -> list[FieldText]:
    """Return the settings of a run, but for those that choose a component, which have a section of their own."""
    return [field for field in fields_of(find_class(SCHEMA, "RunConfig")) if field.name not in component_folders()]


def training_fields() -> list[FieldText]:
    """Return the settings of a stage that trains."""
    return fields_of(find_class(SCHEMA, "TrainingConfig"), "train_STAGE.")


def yaml_names(folder: str) -> list[str]:
    """Return the names of the YAML files in a folder of recipes/, sorted."""
    return sorted(path.stem for path in (FOLDER / "recipes" / folder).glob("*.yaml"))


def _stages() -> Iterator[str]:
    for name, source in registered_in(FOLDER / "stages").items():
        yield from (f"  {row}" for row in table_rows(name, source.summary))
        config = find_in(source.path, f"{source.node.name}.Config")
        own = _without_training(name, config) if config is not None else []
        if own:
            yield textwrap.indent(settings_table(own), "  ")


def _without_training(name: str, config: ClassSource) -> list[FieldText]:
    return [field for field in fields_of(config) if not field.name.startswith(f"train_{name}.")]


def _components() -> Iterator[str]:
    for kind, folder in component_folders().items():
        names = sorted({*registered_in(folder), *yaml_names(kind)})
        yield from (f"  {row}" for row in table_rows(f"{kind}=", ", ".join(names)))


def _listed(names: list[str]) -> list[str]:
    return textwrap.wrap(", ".join(names), 100, initial_indent="  ", subsequent_indent="  ")
