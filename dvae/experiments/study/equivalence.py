"""Formulation 2 is formulation 1 in other coordinates: shown on trained weights.

Formulation 2 diffuses y = x_t - x_hat and shows the refiner y + x_hat beside x_hat (Pandey et al. 2022, section 3.2;
`center: input` in dvae/diffusion/denoiser.py). With the first convolution W1 u + W2 x_hat of a refiner of formulation
1 that is V1 (u + x_hat) + V2 x_hat for V1 = W1 and V2 = W2 - W1: the same function of the same state, up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dvae.config.schema import ModelConfig, Precision
from dvae.diffusion.denoiser import Center
from dvae.errors import UserError
from dvae.inference.pipeline import Pipeline
from dvae.models import bundle, components

IMAGES = 16
"""Images that are drawn by both."""


@dataclass(frozen=True)
class ImageDifference:
    """Between images drawn by formulation 1 and by formulation 2 with the same weights, in fp32."""

    gray_levels: int
    """The largest of any pixel."""
    share: float
    """Of values that differ at all."""


def compare_formulations(run: Path, steps: int, seed: int) -> ImageDifference:
    """Draw the same images by both formulations. Raises UserError where the run is not of formulation 1."""
    config, made = bundle.load(bundle.find_bundle(run))
    if config.denoiser.center is not Center.none or not config.denoiser.condition_image:
        raise UserError(f"run={run} is not of formulation 1: it needs denoiser.center=none, condition_image=true")
    config = replace(config, precision=Precision.fp32)
    drawn = []
    for pipeline in (Pipeline(config, made), Pipeline(*formulation_2(config, made))):
        pipeline.use_sampler(steps=steps)
        drawn.append(pipeline.generate(IMAGES, seed)[1].int())
    apart = (drawn[0] - drawn[1]).abs()
    return ImageDifference(int(apart.max()), float((apart > 0).float().mean()))


def formulation_2(config: ModelConfig, made: components.RunModels) -> tuple[ModelConfig, components.RunModels]:
    """The same refiner in the other coordinates."""
    other = replace(config, denoiser=replace(config.denoiser, center=Center.input))
    built = components.build_models(other)
    for part, module in made.trained_parts().items():
        built.trained_parts()[part].load_state_dict(module.state_dict())
        built.trained_parts()[part].eval().requires_grad_(False)
    first = first_convolution(built.denoiser.refiner)
    seen = first.in_channels // 2
    with torch.no_grad():
        first.weight[:, seen:] -= first.weight[:, :seen]
    return other, built


def first_convolution(refiner: torch.nn.Module) -> torch.nn.Conv2d:
    """The convolution that sees the state, and after it as many channels of x_hat."""
    return next(module for module in refiner.modules() if isinstance(module, torch.nn.Conv2d))
