"""The program of tools/plan.py."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dvae.config import compose
from dvae.config.schema import RunConfig
from dvae.config.tool_arguments import split_arguments
from dvae.planning import plan, plan_report
from dvae.planning.plan_settings import PlanConfig, check
from dvae.utils import atomic_files


def compose_recipe(overrides: list[str]) -> RunConfig:
    """Compose the recipe as tools/launch.py does. The path of the images may be missing, because none are read."""
    composed = compose.compose("train", overrides)
    source = composed.get("source")
    if isinstance(source, DictConfig) and OmegaConf.is_missing(source, "path"):
        source.path = "not looked at"
    return compose.to_run_config(composed)


def run(argv: list[str]) -> str:
    """Plan the recipe that the command-line words `argv` describe and return the plan as text.

    If out= is set, the figures are written to that JSON file. Raises UserError for invalid words.
    """
    settings, overrides = split_arguments(PlanConfig, argv)
    check(settings)
    found = plan.make_plan(compose_recipe(overrides), settings)
    if settings.out:
        atomic_files.write_json(Path(settings.out), plan_report.plan_figures(found))
    return plan_report.format_plan(found)
