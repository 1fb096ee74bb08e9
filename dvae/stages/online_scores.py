"""Score the averaged weights of the refiner during its training, with the first seed of evaluate.seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from dvae.config.compose import uses_stream
from dvae.config.schema import RunConfig
from dvae.evaluation.sliced_wasserstein import sliced_wasserstein
from dvae.inference.pipeline import Pipeline
from dvae.runs.folder import Run
from dvae.stages.image_scores import score_images
from dvae.toy2d import points
from dvae.training.batches import open_shards


def online_scorer(run: Run, config: RunConfig) -> Callable[[Pipeline], dict[str, float]]:
    """Return the function that scores a pipeline during training.

    It scores images by KID-lite0 and FID-lite0 against training images, as the stage evaluate does for the same seed.
    It scores points by the sliced Wasserstein distance, averaged over the classes.
    """
    seed = config.evaluate.seeds[0]

    def score_generated_images(pipeline: Pipeline) -> dict[str, float]:
        train, heldout = open_shards(config, "train"), open_shards(config, "heldout")
        sets = {"refined": [pipeline.generate(config.evaluate.n, seed)[1]]}
        scores = score_images(run, config, sets, [seed], train, heldout, pipeline.nfe, {})["sets"]["refined"]
        return {name: float(scores[name]["mean"]) for name in ("KID-lite0", "FID-lite0")}

    def score_points(pipeline: Pipeline) -> dict[str, float]:
        source, n = points.open_source(config), config.evaluate.n
        return {
            "sliced_wasserstein": statistics.mean(
                sliced_wasserstein(
                    points.sample_points(pipeline, label, n, seed), points.true_points(source, label, n, config.seed)
                )
                for label in points.label_groups(config, source).values()
            )
        }

    return score_points if uses_stream(config) else score_generated_images
