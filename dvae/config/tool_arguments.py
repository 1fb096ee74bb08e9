"""Arguments of a tool that has settings of its own and passes all others on, such as the planner and the sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dvae.config.compose import mistyped

T = TypeVar("T")


def split_arguments(schema: type[T], arguments: Sequence[str]) -> tuple[T, list[str]]:
    """The settings that the fields of a dataclass name, and the arguments that name none of them, in their order.

    Hydra composes the others alone, by the config of tools/launch.py, so that every override of that works. Raises
    UserError for a value of the wrong type.
    """
    names = {field.name for field in fields(schema)}  # type: ignore[arg-type]
    own = [word for word in arguments if "=" in word and word.partition("=")[0] in names]
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist(own))
        settings: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise mistyped(error) from None
    return settings, [word for word in arguments if word not in own]
