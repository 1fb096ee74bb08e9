"""What the planner is told besides the recipe."""

from __future__ import annotations

from dataclasses import dataclass

from dvae.errors import UserError


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """What tools/plan.py takes, besides the overrides of tools/launch.py."""

    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 8
    """GPUs of each, one rank for each."""
    gpu: str = "h100"
    """Which GPU, of dvae/planning/hardware.py."""
    efficiency: float = 0.1
    """Share of the data sheet's peak that training reaches, in all its time: what docs/recipes.md assumes; take what
    you have measured."""
    reserve: float = 0.1
    """Share of the GPU's memory that is kept free: for CUDA, libraries' workspaces and gaps between tensors."""
    overlap: bool | None = None
    """Whether communication hides behind computing (null: as the engine has it, at ZeRO stage 3 alone)."""
    network: float | None = None
    """GB/s from machine to machine, for each GPU and direction (null: the table's)."""
    packing: float = 0.6
    """Bytes of a PNG over bytes of its pixels, where there are no shards yet whose manifest would tell."""
    out: str = ""
    """A JSON file for the figures (empty: none)."""


def check(settings: PlanConfig) -> PlanConfig:
    """Raise UserError for a number that no machine has."""
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
