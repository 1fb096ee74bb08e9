"""The stage prior: fit a distribution of z to the posteriors of the training images."""

from __future__ import annotations

import time
from dataclasses import dataclass

from dvae.registry.stages.base import STAGES, StageConfig
from dvae.runs.folder import Run
from dvae.stages.base import Stage
from dvae.stages.posteriors import load_posteriors
from dvae.stages.run_models import export_bundle, load_models
from dvae.utils import rng


@STAGES.register("prior")
class PriorStage(Stage):
    """Fits a distribution of z to the posteriors of the training images."""

    @dataclass(kw_only=True, slots=True)
    class Config(StageConfig):
        """The stage prior adds no settings."""

    after = ("encoder",)
    makes = ("prior",)

    def run(self, run: Run) -> None:
        began, config = time.perf_counter(), self.config
        models = load_models(run, config, "encoder")
        posterior = load_posteriors(run, config, models)
        seed = rng.child(config.seed, "prior") % 2**31
        figures = models.prior.fit(posterior.mean, posterior.logvar, seed)
        run.save_weights("prior", models.prior.state_dict())
        export_bundle(run, config)
        run.finish(self.name, {"seconds": time.perf_counter() - began, **figures})
