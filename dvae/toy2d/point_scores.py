"""The evaluate stage of a run on points: scatter plots, and the distance of each class to the truth."""

from __future__ import annotations

import statistics
import time
from typing import Any

from omegaconf import OmegaConf

from dvae.config.schema import RunConfig
from dvae.evaluation.sliced_wasserstein import DIRECTIONS, sliced_wasserstein, two_sample_floor
from dvae.inference.pipeline import Pipeline
from dvae.runs.folder import Run
from dvae.toy2d import points
from dvae.tracking import scatter
from dvae.tracking.console import Progress

SHOWN = 2000
"""Points in each panel of the picture, at most."""


def evaluate_points(run: Run, config: RunConfig, pipeline: Pipeline) -> dict[str, Any]:
    """samples.png, and the sliced Wasserstein distances. Returns what summary.json holds of them."""
    settings, source = config.evaluate, points.open_source(config)
    groups = points.label_groups(config, source)
    true = {name: points.true_points(source, label, settings.n, config.seed) for name, label in groups.items()}
    shown, figures = {}, {}
    began = time.perf_counter()
    total = settings.n * len(settings.seeds) * len(groups)
    with Progress("samples", total) as progress:
        for name, label in groups.items():
            sets = [
                points.sample_points(pipeline, label, settings.n, seed, lambda n: progress.update(progress.step + n, n))
                for seed in settings.seeds
            ]
            shown[name] = sets[0][:SHOWN]
            figures[name] = [sliced_wasserstein(drawn, true[name]) for drawn in sets]
    speed = total / (time.perf_counter() - began)
    scatter.compare({name: some[:SHOWN] for name, some in true.items()}, shown, run.images / "points.png")

    def floor(label: int | None) -> list[float]:
        return two_sample_floor(lambda n, seed: points.true_points(source, label, n, seed), settings.n)

    return {
        "sampler": OmegaConf.to_container(OmegaConf.structured(config.sampler), enum_to_str=True),
        "nfe": pipeline.nfe,
        "refined_images_per_second": speed,
        "points": {
            "n": settings.n,
            "directions": DIRECTIONS,
            "classes": {
                name: {"sliced_wasserstein": figure(figures[name]), "floor": figure(floor(label))}
                for name, label in groups.items()
            },
        },
    }


def figure(values: list[float]) -> dict[str, Any]:
    """Mean, standard error (none of a single value) and the values."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": statistics.mean(values), "se": error, "values": values}
