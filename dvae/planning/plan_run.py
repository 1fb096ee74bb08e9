"""What tools/plan.py does."""

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
    """The recipe as tools/launch.py composes it; a path to images is not needed, since none are looked at."""
    composed = compose.compose("train", overrides)
    source = composed.get("source")
    if isinstance(source, DictConfig) and OmegaConf.is_missing(source, "path"):
        source.path = "not looked at"
    return compose.to_run_config(composed)


def run(argv: list[str]) -> str:
    """The plan of the overrides, as text; the figures go into the file of out=. Raises UserError."""
    settings, overrides = split_arguments(PlanConfig, argv)
    check(settings)
    found = plan.make_plan(compose_recipe(overrides), settings)
    if settings.out:
        atomic_files.write_json(Path(settings.out), plan_report.plan_figures(found))
    return plan_report.format_plan(found)
