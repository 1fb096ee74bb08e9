"""Score the refiner while it trains: its averaged weights, every evaluate.every_steps steps, with the first seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from dvae.config.compose import uses_stream
from dvae.config.schema import RunConfig
from dvae.data.shards.reader import Shards, evenly_spaced
from dvae.evaluation.sliced_wasserstein import sliced_wasserstein
from dvae.inference.pipeline import Pipeline
from dvae.runs.folder import Run
from dvae.toy2d import points


def scorer(run: Run, config: RunConfig, shards: Callable[[str], Shards]) -> Callable[[Pipeline], dict[str, float]]:
    """What scores a pipeline; `shards` opens a split of the run's.

    Of images KID-lite0 and FID-lite0 against training images, as the evaluate stage scores the same seed; of points the
    sliced Wasserstein distance, the mean over the classes.
    """
    seed = config.evaluate.seeds[0]

    def of_images(pipeline: Pipeline) -> dict[str, float]:
        from dvae.evaluation.scorer import score  # here, since it needs the extra `metrics`

        settings = config.evaluate
        train, heldout = shards("train"), shards("heldout")
        found = score(
            {"refined": [pipeline.generate(settings.n, seed)[1]]},
            train.read(evenly_spaced(len(train), settings.n_reference)),
            heldout.read(evenly_spaced(len(heldout), settings.n)),
            seeds=[seed],
            sampler={},
            nfe=pipeline.nfe,
            kid_subset_size=settings.kid_subset_size,
            kid_subsets=settings.kid_subsets,
            cache=run.path / "cache",
            batch=settings.batch,
        )["sets"]["refined"]
        return {name: float(found[name]["mean"]) for name in ("KID-lite0", "FID-lite0")}

    def of_points(pipeline: Pipeline) -> dict[str, float]:
        source, n = points.open_source(config), config.evaluate.n
        return {
            "sliced_wasserstein": statistics.mean(
                sliced_wasserstein(points.drawn(pipeline, label, n, seed), points.true(source, label, n, config.seed))
                for label in points.groups(config, source).values()
            )
        }

    return of_points if uses_stream(config) else of_images
