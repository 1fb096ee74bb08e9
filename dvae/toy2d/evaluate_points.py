"""The evaluate stage of a run on points: scatter plots, and the distance of each class to the true density."""

from __future__ import annotations

import time
from typing import Any

from omegaconf import OmegaConf

from dvae.config.schema import RunConfig
from dvae.evaluation.sliced_wasserstein import DIRECTIONS
from dvae.inference.pipeline import Pipeline
from dvae.runs.folder import Run
from dvae.toy2d import point_scores, points
from dvae.tracking import scatter
from dvae.tracking.console import Progress

PANEL_POINTS = 2000
"""Maximum number of points in each scatter plot."""


def evaluate_points(run: Run, config: RunConfig, pipeline: Pipeline) -> dict[str, Any]:
    """Write points.png, and compute the sliced Wasserstein distances.

    Returns:
        The "evaluation" entry of summary.json.
    """
    settings, source = config.evaluate, points.open_source(config)
    groups = points.label_groups(config, source)
    true = {name: points.true_points(source, label, settings.n, config.seed) for name, label in groups.items()}
    panels, distances = {}, {}
    began = time.perf_counter()
    total = settings.n * len(settings.seeds) * len(groups)
    with Progress("samples", total) as progress:
        for name, label in groups.items():
            sets = [
                points.sample_points(pipeline, label, settings.n, seed, lambda n: progress.update(progress.step + n, n))
                for seed in settings.seeds
            ]
            panels[name] = sets[0][:PANEL_POINTS]
            distances[name] = point_scores.distances(sets, true[name])
    speed = total / (time.perf_counter() - began)
    true_panels = {name: each[:PANEL_POINTS] for name, each in true.items()}
    scatter.compare(true_panels, panels, run.images / "points.png")
    return {
        "sampler": OmegaConf.to_container(OmegaConf.structured(config.sampler), enum_to_str=True),
        "nfe": pipeline.nfe,
        "refined_images_per_second": speed,
        "points": {
            "n": settings.n,
            "directions": DIRECTIONS,
            "classes": {
                name: {
                    "sliced_wasserstein": distances[name],
                    "floor": point_scores.floor(source, label, settings.n),
                }
                for name, label in groups.items()
            },
        },
    }
