"""Settings of tools/quantize.py, and their limits."""

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
    """What tools/quantize.py takes."""

    run: str = MISSING
    """A run folder or a bundle."""
    method: QuantizationMethod = MISSING
    """int8_weights | int8 | int4_weights."""
    out: str = MISSING
    """Folder of the quantized bundle; it must not be there yet."""
    group: int = 32
    """For int4_weights: inputs that share a scale; even."""
    buckets: int = 4
    """For int8: parts of the time with scales of activations of their own."""
    calibration: int = 64
    """For int8: images that are drawn to see the range of every activation."""
    seed: int = 0
    """Seed of these images, and the first of those that are compared."""
    rounds: int = 5
    """Rounds in which original and quantized draw 16 images each, for their speed (0: it is not measured)."""
    n: int = 0
    """Images per seed whose KID is compared (0: it is not measured); needs shards."""
    seeds: int = 3
    """Number of such seeds."""
    steps: int = 0
    """Steps of the sampler while images are compared (0: the run's own)."""
    shards: str = ""
    """Real images for KID (empty: the shards that the run was trained on)."""
    kid_subset_size: int = 100
    """Images per subset of KID."""
    budget: float = 0.05
    """Share by which KID may grow, both less the floor of real images, for a bundle that is offered for speed."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import, which register components."""


ConfigStore.instance().store(name="quantize_schema", node=QuantizeConfig, provider="dvae")


def check_settings(settings: QuantizeConfig) -> None:
    """Raise UserError for words out of range, and for a method that this machine has not."""
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
