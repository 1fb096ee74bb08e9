"""Settings of tools/quantize.py, and their checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from dvae.errors import UserError
from dvae.models.quantization import integer_layer
from dvae.models.quantization.layer_plan import QuantizationMethod


@dataclass(kw_only=True, slots=True)
class QuantizeConfig:
    """Settings of tools/quantize.py."""

    run: str = MISSING
    """Run folder or bundle."""
    method: QuantizationMethod = MISSING
    """Quantization method: int8_weights, int8 or int4_weights."""
    out: str = MISSING
    """Folder of the quantized bundle. It must not exist."""
    group: int = 32
    """For int4_weights: number of inputs that share a scale. It must be even."""
    buckets: int = 4
    """For int8: number of intervals of the diffusion time. Activations have different scales in each."""
    calibration: int = 64
    """For int8: number of images that are drawn to measure the ranges of activations."""
    seed: int = 0
    """Seed of these images, and first seed of the images for KID."""
    rounds: int = 5
    """Rounds of the speed measurement. In each, both bundles draw 16 images (0: speed is not measured)."""
    n: int = 0
    """Number of images per seed for KID (0: KID is not measured). It needs shards."""
    seeds: int = 3
    """Number of seeds for KID."""
    steps: int = 0
    """Sampler steps of the images for KID (0: the run's)."""
    shards: str = ""
    """Folder of real images for KID (empty: the shards that the run was trained on)."""
    kid_subset_size: int = 100
    """Number of images per subset of KID."""
    budget: float = 0.05
    """Largest relative growth of KID minus the floor of real images with which a bundle may be offered for speed."""
    plugins: list[str] = field(default_factory=list)
    """Python modules to import first. They register components."""


ConfigStore.instance().store(name="quantize_schema", node=QuantizeConfig, provider="dvae")


def check_settings(settings: QuantizeConfig) -> None:
    """Raise UserError if a setting is out of range, or if this machine does not support the method."""
    least = {"buckets": 1, "calibration": 1, "rounds": 0, "n": 0, "seeds": 1, "steps": 0, "kid_subset_size": 2}
    for name, low in least.items():
        if getattr(settings, name) < low:
            raise UserError(f"{name}={getattr(settings, name)}: use {low} or more")
    if settings.group < 2 or settings.group % 2:
        raise UserError(f"group={settings.group}: use an even number, 32 or 64")
    if settings.n and settings.kid_subset_size > settings.n:
        raise UserError(f"kid_subset_size={settings.kid_subset_size} is more than n={settings.n}: use a smaller subset")
    if not settings.budget >= 0:
        raise UserError(f"budget={settings.budget:g}: use 0 or more")
    if Path(settings.out).exists():
        raise UserError(f"out={settings.out} is there already: name a folder that is not")
    if settings.method is QuantizationMethod.int8:
        integer_layer.check_machine()
