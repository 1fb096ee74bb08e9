"""Fit a prior to the latents of a run, compare it with other priors, and write a bundle with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dvae.data.shards.manifest import HELDOUT, TRAIN
from dvae.inference.encode_posteriors import encode_posteriors
from dvae.inference.inference_core import InferenceCore
from dvae.inference.run_images import open_split
from dvae.models import bundle_export
from dvae.registry.encoders.base import Posterior
from dvae.registry.priors.base import PRIORS, Prior
from dvae.utils import rng


@dataclass(frozen=True)
class PriorComparison:
    """Log-likelihood of held-out latents under a prior, in nats per dimension.

    Each figure is a mean over images and its standard error.
    """

    name: str
    draws: tuple[float, float]
    """Figure of one sample z ~ q(z | x) per image. The refiner was trained on such samples."""
    means: tuple[float, float]
    """Figure of the posterior means."""


@dataclass(frozen=True)
class PriorFit:
    """Result of a fit: figures of the new prior and a comparison with other priors."""

    figures: dict[str, float]
    """Figures of the fit, as returned by the prior's `fit`."""
    images: int
    """Number of training images whose latents were fitted."""
    heldout: int
    """Number of held-out images on which the priors were compared."""
    table: list[PriorComparison]
    """Comparison of the new prior, the run's own prior and N(0, I)."""


def fit_prior(core: InferenceCore, config: Any, folder: Path, *, run: str, shards: str, seed: int | None) -> PriorFit:
    """Fit a prior to the latents of all training images, compare it on the held-out images, and write a bundle with it.

    Args:
        core: the models of the run.
        config: the prior's config node.
        folder: folder of the new bundle.
        run: the run folder or bundle.
        shards: folder of the run's shards ("": the folder that the run used).
        seed: seed of the fit. None takes the seed of the run's own prior stage.
    """
    prior_config = PRIORS.config(config)
    prior = PRIORS.build(prior_config, core.models.shapes).to(core.device)
    posteriors = []
    for split in (TRAIN, HELDOUT):
        images = open_split(run, core.config, split, shards)
        posteriors.append(encode_posteriors(core, images, len(images), split))
    training, heldout = posteriors
    seed = rng.child(core.config.seed, "prior") % 2**31 if seed is None else seed
    figures = prior.fit(training.mean, training.logvar, seed)
    priors: list[tuple[str, Prior]] = [
        (prior_config.name, prior),
        (f"{core.config.prior.name} (the run's)", core.models.prior),
        ("N(0, I)", PRIORS.build({"name": "normal"}, core.models.shapes)),
    ]
    table = list(compare_priors(priors, heldout, seed))
    write_bundle(core, prior_config, prior, folder)
    return PriorFit(figures, len(training.mean), len(heldout.mean), table)


def compare_priors(priors: list[tuple[str, Prior]], heldout: Posterior, seed: int) -> Iterator[PriorComparison]:
    """Compute the log-likelihood of the same latents under each prior."""
    noise = rng.normal(seed, "held-out draw", range(len(heldout.mean)), tuple(heldout.mean.shape[1:]))
    draws, dimensions = heldout.sample(noise), heldout.mean[0].numel()
    for name, prior in priors:
        device = next(iter([*prior.parameters(), *prior.buffers()]), draws).device
        figures = [mean_and_error(prior.log_prob(z.to(device)).cpu() / dimensions) for z in (draws, heldout.mean)]
        yield PriorComparison(name, *figures)


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Return the mean of values (n,) and its standard error (NaN for one value)."""
    error = values.double().std() / math.sqrt(len(values)) if len(values) > 1 else torch.tensor(math.nan)
    return float(values.double().mean()), float(error)


def write_bundle(core: InferenceCore, prior_config: Any, prior: Prior, folder: Path) -> None:
    """Write a copy of the run's bundle with another prior."""
    parts = {name: part.state_dict() for name, part in core.models.trained_parts().items() if name != "prior"}
    if prior.state_dict():
        parts["prior"] = prior.state_dict()
    bundle_export.export(folder, replace(core.config, prior=prior_config), parts)
