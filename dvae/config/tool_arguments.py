"""Arguments of tools that have own settings and pass all other arguments on, such as the planner and the sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dvae.config.compose import mistyped

T = TypeVar("T")


def split_arguments(schema: type[T], arguments: Sequence[str]) -> tuple[T, list[str]]:
    """Split the arguments of a tool into its own settings and the remaining arguments, in their order.

    An argument is one of the tool's settings if it names a field of the dataclass `schema`. The caller composes the
    remaining arguments with the config of tools/launch.py, so every override of that tool works. Raises UserError for
    a value of the wrong type.
    """
    names = {field.name for field in fields(schema)}  # type: ignore[arg-type]
    own = [word for word in arguments if "=" in word and word.partition("=")[0] in names]
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist(own))
        settings: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise mistyped(error) from None
    return settings, [word for word in arguments if word not in own]
