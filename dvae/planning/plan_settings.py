"""Settings of the planner, besides the recipe."""

from __future__ import annotations

from dataclasses import dataclass

from dvae.errors import UserError


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """Settings of tools/plan.py, besides the overrides of tools/launch.py."""

    nodes: int = 1
    """Number of nodes, 1 or more."""
    gpus_per_node: int = 8
    """GPUs of each node, 1 or more. Each GPU is one rank."""
    gpu: str = "h100"
    """Name of the GPU in dvae/planning/hardware.py."""
    efficiency: float = 0.1
    """Share of the data sheet's peak that training reaches on average, in (0, 1]. The default is the assumption of
    docs/recipes.md; use a value that you have measured."""
    reserve: float = 0.1
    """Share of the GPU's memory to keep free, in [0, 1), for CUDA, library workspaces and gaps between tensors."""
    overlap: bool | None = None
    """Whether communication overlaps with computing. null: as in the engine, at ZeRO stage 3 only."""
    network: float | None = None
    """GB/s between nodes, for each GPU and direction. null: the value in dvae/planning/hardware.py."""
    packing: float = 0.6
    """Bytes of a PNG divided by the bytes of its pixels. Used only if there are no shards yet."""
    out: str = ""
    """JSON file for the figures. Empty: none is written."""


def check(settings: PlanConfig) -> PlanConfig:
    """Return `settings`. Raises UserError if a value is outside its valid range."""
    for name in ("nodes", "gpus_per_node"):
        if getattr(settings, name) < 1:
            raise UserError(f"{name}={getattr(settings, name)}: use 1 or more")
    if not 0.0 < settings.efficiency <= 1.0:
        raise UserError(f"efficiency={settings.efficiency:g}: a share of the peak, use more than 0 and at most 1")
    if not 0.0 <= settings.reserve < 1.0:
        raise UserError(f"reserve={settings.reserve:g}: a share of the memory, use 0 or more, and less than 1")
    for name in ("network", "packing"):
        value = getattr(settings, name)
        if value is not None and not value > 0.0:
            raise UserError(f"{name}={value:g}: use a number above 0")
    return settings
