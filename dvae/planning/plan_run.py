"""What tools/plan.py does."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dvae import config, files
from dvae.planning import plan, report
from dvae.planning.settings import parted
from dvae.settings import RunConfig


def recipe(words: list[str]) -> RunConfig:
    """The recipe as tools/launch.py composes it; a path to images is not needed, since none are looked at."""
    composed = config.compose("train", words)
    source = composed.get("source")
    if isinstance(source, DictConfig) and OmegaConf.is_missing(source, "path"):
        source.path = "not looked at"
    return config.typed(composed)


def run(argv: list[str]) -> str:
    """The plan of the words, as text; the figures go into the file of out=. Raises UserError."""
    settings, words = parted(argv)
    found = plan.make(recipe(words), settings)
    if settings.out:
        files.write_json(Path(settings.out), report.figures(found))
    return report.text(found)
