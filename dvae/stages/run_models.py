"""Load the models of a run with the weights of its finished stages, and export them as the run's bundle."""

from __future__ import annotations

import torch

from dvae.config.schema import RunConfig
from dvae.models import bundle_export, components
from dvae.models.components import RunModels
from dvae.runs.folder import Run
from dvae.utils.weights import fit_weights

BUNDLE_PARTS = ("encoder", "prior", "denoiser", "classifier")
"""The parts of a bundle, in the order in which they are trained."""


def default_device() -> torch.device:
    """Return the current GPU of this process if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_models(run: Run, config: RunConfig, *parts: str) -> RunModels:
    """Build the run's models on the default device, with the trained weights of `parts`.

    Raises UserError if one of the parts is not trained yet.
    """
    if unknown := [part for part in parts if part not in BUNDLE_PARTS]:
        raise ValueError(f"unknown part {unknown[0]!r}: the parts are {', '.join(BUNDLE_PARTS)}")
    models = components.build_models(config)
    for part in parts:
        if part not in models.trained_parts():  # this part has no weights
            continue
        fit_weights(models.trained_parts()[part], run.load_weights(part), str(run.weights(part)))
    for module in models.trained_parts().values():
        module.to(default_device())
    return models


def export_bundle(run: Run, config: RunConfig) -> None:
    """Write the bundle with all parts that are trained so far."""
    parts = {part: run.load_weights(part) for part in BUNDLE_PARTS if run.has_weights(part)}
    bundle_export.export(run.bundle, config, parts)
