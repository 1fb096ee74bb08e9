"""What tools/plan.py does."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dvae.config import compose
from dvae.config.schema import RunConfig
from dvae.planning import plan, plan_report
from dvae.planning.plan_settings import parted
from dvae.utils import atomic_files


def recipe(words: list[str]) -> RunConfig:
    """The recipe as tools/launch.py composes it; a path to images is not needed, since none are looked at."""
    composed = compose.compose("train", words)
    source = composed.get("source")
    if isinstance(source, DictConfig) and OmegaConf.is_missing(source, "path"):
        source.path = "not looked at"
    return compose.typed(composed)


def run(argv: list[str]) -> str:
    """The plan of the words, as text; the figures go into the file of out=. Raises UserError."""
    settings, words = parted(argv)
    found = plan.make(recipe(words), settings)
    if settings.out:
        atomic_files.write_json(Path(settings.out), plan_report.figures(found))
    return plan_report.text(found)
