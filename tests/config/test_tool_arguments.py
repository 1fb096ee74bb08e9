"""Arguments of tools that pass the overrides of a run on."""

from __future__ import annotations

import pytest

from dvae.config.tool_arguments import split_arguments
from dvae.errors import UserError
from dvae.experiments.sweeps.sweep_loop import SweepToolConfig
from dvae.planning.plan_settings import PlanConfig


def test_own_settings_are_split_from_the_overrides() -> None:
    settings, overrides = split_arguments(
        PlanConfig, ["recipe=x", "nodes=2", "overlap=true", "refiner=dit", "refiner.width=8"]
    )
    assert settings == PlanConfig(nodes=2, overlap=True)
    assert overrides == ["recipe=x", "refiner=dit", "refiner.width=8"]


def test_a_word_that_sets_nothing_is_an_override() -> None:
    settings, overrides = split_arguments(
        SweepToolConfig, ["sweep=demo", "n=3", "seed=4", "train_refiner.steps=2", "~classifier"]
    )
    assert settings == SweepToolConfig(sweep="demo", n=3)
    assert overrides == ["seed=4", "train_refiner.steps=2", "~classifier"]


def test_a_value_of_the_wrong_type_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^n: Value 'many'"):
        split_arguments(SweepToolConfig, ["sweep=demo", "n=many"])
