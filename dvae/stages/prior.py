"""The stage prior: fit a distribution of z to the posteriors of the training images."""

from __future__ import annotations

import time

from dvae.config.schema import RunConfig
from dvae.runs.folder import Run
from dvae.stages.posteriors import load_posteriors
from dvae.stages.run_models import export_bundle, load_models
from dvae.utils import rng


def run_prior_stage(run: Run, config: RunConfig) -> None:
    began = time.perf_counter()
    models = load_models(run, config, "encoder")
    posterior = load_posteriors(run, config, models)
    seed = rng.child(config.seed, "prior") % 2**31
    figures = models.prior.fit(posterior.mean, posterior.logvar, seed)
    run.save_weights("prior", models.prior.state_dict())
    export_bundle(run, config)
    run.finish("prior", {"seconds": time.perf_counter() - began, **figures})
