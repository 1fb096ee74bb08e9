"""Post-hoc moving averages: an average of any width, made from snapshots of two (Karras et al. 2024, appendix C).

The weight that a power profile of exponent gamma gives step i at step T is ((i/T)^(gamma+1) - ((i-1)/T)^(gamma+1)): the
integral over (i - 1, i] of p(t) = (gamma + 1) t^gamma / T^(gamma+1). So what holds for profiles over [0, T] holds for
the averages of a training exactly: a sum of profiles that is near another gives a sum of averages that is near the
other's. Here the coefficients also add up to 1, which the paper does not ask for: a weight that never moved is made
exactly, and the error is in proportion to what the weights moved, not to what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from dvae.config.schema import WIDTHS, EmaProfile, RunConfig
from dvae.errors import UserError
from dvae.models import components
from dvae.registry.stages.base import exported_parts
from dvae.runs.folder import Run
from dvae.training.engine.ema import power_exponent
from dvae.training.engine.snapshots import WeightSnapshot, list_snapshots
from dvae.training.export import export_with_part, open_run
from dvae.utils.weights import StateDict, refuse_nonfinite, save_weights

RIDGE = 1e-10
"""Relative to each profile's squared norm: keeps coefficients small where snapshots lie close together."""
MAX_SNAPSHOTS = 5000
"""Snapshots that a fit takes: its matrices have the square of that many numbers."""


@dataclass(kw_only=True, slots=True)
class EmaToolConfig:
    """What tools/ema.py takes."""

    run: str = MISSING
    """A run folder."""
    stage: str = "refiner"
    """Stage whose weights are averaged: encoder, refiner or classifier."""
    width: float | None = None
    """Width (sigma_rel) of the average that is made, 0.005 to 0.28; or else decay."""
    decay: float | None = None
    """Decay of an average that was kept (ema.extra_decays) and is taken out as it is."""
    step: int = 0
    """Step of the average (0: that of the last snapshot)."""
    out: str = ""
    """Weights file that is written (empty: none)."""
    bundle: str = ""
    """Folder of a bundle that is written, the run's other parts as they are (empty: none)."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import, which register components."""


ConfigStore.instance().store(name="ema_schema", node=EmaToolConfig, provider="dvae")


@dataclass(frozen=True)
class EmaFit:
    """An average as a linear combination of snapshots."""

    step: int
    snapshots: list[WeightSnapshot]
    coefficients: np.ndarray
    """One for each snapshot; they add up to 1."""
    error: float
    """Relative error of the profile, in L2 over training time."""


def profile_inner_products(steps: np.ndarray, gammas: np.ndarray, step: float, gamma: float) -> np.ndarray:
    """Integrals over t of the profiles (steps, gammas), each (n,), times the profile (step, gamma): (n,).

    With a the one that ends first: (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) (t_a / t_b)^gamma_b / t_b.
    """
    first, last = np.minimum(steps, step), np.maximum(steps, step)
    exponent = np.where(steps <= step, gamma, gammas)
    return (gammas + 1) * (gamma + 1) / ((gammas + gamma + 1) * last) * (first / last) ** exponent


def solve_coefficients(steps: np.ndarray, widths: np.ndarray, step: int, width: float) -> tuple[np.ndarray, float]:
    """Coefficients (n,), adding up to 1, of averages of `widths` (n,) at `steps` (n,) for one of `width` at `step`.

    They minimize the distance in L2 between the profiles; returns it too, relative to the norm of the profile.
    """
    gammas, gamma = np.array([power_exponent(one) for one in widths]), power_exponent(width)
    gram = np.stack([profile_inner_products(steps, gammas, *one) for one in zip(steps, gammas, strict=True)])
    norm = np.sqrt(profile_inner_products(np.array([step]), np.array([gamma]), step, gamma)[0])
    norms = np.sqrt(np.diag(gram))
    cosines, wanted = gram / np.outer(norms, norms), profile_inner_products(steps, gammas, step, gamma) / (norms * norm)
    masses = norm / norms  # of profiles of norm 1, in units of the wanted one's
    solved = np.linalg.solve(cosines + RIDGE * np.eye(len(steps)), np.stack([wanted, masses], 1))
    free, shift = solved.T
    solution = free + (1 - masses @ free) / (masses @ shift) * shift  # Lagrange: their masses add up to 1
    squared = 1 - 2 * solution @ wanted + solution @ cosines @ solution
    return solution * masses, float(np.sqrt(max(0.0, squared)))


def fit_average(snapshots: Sequence[WeightSnapshot], step: int, width: float) -> EmaFit:
    """The best combination of snapshots of power profile. Snapshots long after `step` are not used."""
    end = min(one.step for one in snapshots if one.step >= step)
    used = [one for one in snapshots if one.step <= end]
    steps, widths = np.array([float(one.step) for one in used]), np.array([one.spec.value for one in used])
    coefficients, error = solve_coefficients(steps, widths, step, width)
    return EmaFit(step, used, coefficients, error)


def combine_snapshots(fit: EmaFit, module: torch.nn.Module) -> StateDict:
    """The state dict of a fit, for `module`, whose weights may be on the meta device.

    A buffer is not averaged: it is that of the snapshot nearest in time. Raises MachineError if a snapshot is damaged
    or differs from its hash, UserError if it does not fit the module, and if a number is not finite.
    """
    nearest = min(fit.snapshots, key=lambda one: abs(one.step - fit.step))
    own, state = module.state_dict(), {}
    parameters = [name for name, _ in module.named_parameters() if name in own]
    sums = {name: torch.zeros(own[name].shape, dtype=torch.float64, device="cpu") for name in parameters}
    for snapshot, coefficient in zip(fit.snapshots, fit.coefficients, strict=True):
        values = snapshot.load(module)
        for name, total in sums.items():
            total.add_(values[name].double(), alpha=float(coefficient))
        if snapshot is nearest:
            state = values
    average = state | {name: total.float() for name, total in sums.items()}
    refuse_nonfinite(average, f"the average of {nearest.path.parent} at step {fit.step}")
    return average


def build_average(settings: EmaToolConfig) -> EmaFit:
    """Build the average that `settings` describe, and write it.

    Raises UserError if it cannot be built, MachineError if a snapshot is damaged. Then nothing is written.
    """
    run, config = _check_settings(settings)
    snapshots = list_snapshots(run.path / "snapshots" / settings.stage)
    if not snapshots:
        raise UserError(
            f"run={settings.run} has no snapshots of its {settings.stage}: train with train_{settings.stage}"
            ".ema.snapshot_every=1000 and .extra_widths=[0.05,0.1]"
        )
    if settings.width is None:
        fit = _stored_average(snapshots, settings)
    else:
        fit = _fitted_average(snapshots, settings, settings.width)
    part, trained = exported_parts()[settings.stage], components.build_models_on_meta(config).trained_parts()
    if part not in trained:
        raise UserError(f"stage={settings.stage}: by its config, run={settings.run} has none with weights")
    weights = combine_snapshots(fit, trained[part])
    if settings.out:
        save_weights(Path(settings.out), weights)
    if settings.bundle:
        export_with_part(run, config, part, weights, Path(settings.bundle))
    return fit


def _check_settings(settings: EmaToolConfig) -> tuple[Run, RunConfig]:
    """The run and its config. Raises UserError for words that are wrong whatever snapshots there are."""
    if (settings.width is None) == (settings.decay is None):
        raise UserError("an average has a width or a decay: add width=0.15, or decay=NUMBER of one that was kept")
    if settings.width is not None and not WIDTHS[0] <= settings.width <= WIDTHS[1]:
        raise UserError(f"width={settings.width:g}: use {WIDTHS[0]} to {WIDTHS[1]}")
    if not settings.out and not settings.bundle:
        raise UserError("nothing would be written: add out=FILE.safetensors or bundle=FOLDER")
    if settings.out and Path(settings.out).is_dir():
        raise UserError(f"out={settings.out} is a folder: name a file, or use bundle=")
    run = open_run(settings.run, settings.stage, "bundle", settings.bundle)
    return run, run.config()


def _resolve_step(snapshots: Sequence[WeightSnapshot], settings: EmaToolConfig) -> int:
    last = max(one.step for one in snapshots)
    if not 0 <= settings.step <= last:
        raise UserError(f"step={settings.step}: use 1 to {last}, the step of the last snapshot")
    return settings.step or last


def _fitted_average(snapshots: list[WeightSnapshot], settings: EmaToolConfig, width: float) -> EmaFit:
    usable = [one for one in snapshots if one.spec.profile is EmaProfile.power]
    if len(usable) < 2:
        raise UserError(
            f"run={settings.run} has {len(usable)} snapshots of power profile of its {settings.stage}, a fit needs 2: "
            f"train with train_{settings.stage}.ema.extra_widths=[0.05,0.1]"
        )
    if len(usable) > MAX_SNAPSHOTS:
        raise UserError(
            f"run={settings.run} has {len(usable)} snapshots of its {settings.stage}, a fit takes {MAX_SNAPSHOTS} at "
            "most: move some to another folder"
        )
    return fit_average(usable, _resolve_step(usable, settings), width)


def _stored_average(snapshots: list[WeightSnapshot], settings: EmaToolConfig) -> EmaFit:
    """An average of constant profile, just as it was kept."""
    constant = [one for one in snapshots if one.spec.profile is EmaProfile.constant]
    same = [one for one in constant if one.spec.value == settings.decay]
    if not same:
        known = ", ".join(sorted({str(one.spec.value) for one in constant})) or "none"
        raise UserError(f"decay={settings.decay}: no such average was kept, only a width can be made: kept: {known}")
    step = _resolve_step(same, settings)
    if chosen := [one for one in same if one.step == step]:
        return EmaFit(step, chosen, np.ones(1), 0.0)
    steps = [one.step for one in same]
    raise UserError(f"step={step}: an average of constant profile is to be had at its snapshots only: {steps}")
