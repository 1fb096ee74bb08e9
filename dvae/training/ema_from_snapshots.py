"""Reconstruct an average of any width after training, from snapshots of two averages (Karras et al. 2024, appendix C).

At step T, a power profile with exponent gamma gives step i the weight (i/T)^(gamma+1) - ((i-1)/T)^(gamma+1). That is
the integral over (i - 1, i] of p(t) = (gamma + 1) t^gamma / T^(gamma+1). So the weights of discrete steps follow
exactly from the continuous profile on [0, T]. If a sum of profiles is close to another profile, then the same sum of
averages is close to the other average.

Unlike in the paper, the coefficients also add up to 1. Then a weight that never changed is reconstructed exactly. The
error is proportional to the change of the weights during training, not to the weights.
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
"""Ridge added to the Gram matrix of normalized profiles. It keeps coefficients small if snapshots are close in time."""
MAX_SNAPSHOTS = 5000
"""Largest number of snapshots in a fit. The matrices of a fit have its square as number of entries."""


@dataclass(kw_only=True, slots=True)
class EmaToolConfig:
    """Settings of tools/ema.py."""

    run: str = MISSING
    """Run folder."""
    stage: str = "refiner"
    """Stage whose averaged weights are wanted: encoder, refiner or classifier."""
    width: float | None = None
    """Width (sigma_rel) of the average to reconstruct, 0.005 to 0.28. Set either width or decay."""
    decay: float | None = None
    """Decay of an average in the snapshots (ema.extra_decays). It is copied, not reconstructed."""
    step: int = 0
    """Training step of the average (0: the step of the last snapshot)."""
    out: str = ""
    """Weights file to write, .safetensors (empty: none)."""
    bundle: str = ""
    """Folder of a bundle to write, with the run's other parts unchanged (empty: none). It must not exist."""
    plugins: list[str] = field(default_factory=list)
    """Python modules to import first. They register components."""


ConfigStore.instance().store(name="ema_schema", node=EmaToolConfig, provider="dvae")


@dataclass(frozen=True)
class EmaFit:
    """An average as a linear combination of snapshots."""

    step: int
    """Training step of the average."""
    snapshots: list[WeightSnapshot]
    """The n snapshots that are combined."""
    coefficients: np.ndarray
    """(n,): one coefficient for each snapshot. They add up to 1."""
    error: float
    """L2 distance of the fitted profile to the wanted one over training time, relative to the wanted profile's norm."""


def profile_inner_products(steps: np.ndarray, gammas: np.ndarray, step: float, gamma: float) -> np.ndarray:
    """Inner products (n,) of n power profiles with one more, that is integrals of their products over training time.

    `steps` and `gammas`, each (n,), are the steps and exponents of the n profiles. `step` and `gamma` are the step and
    exponent of the other one. For profiles a and b with steps t_a <= t_b, the inner product is
    (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) (t_a / t_b)^gamma_b / t_b.
    """
    first, last = np.minimum(steps, step), np.maximum(steps, step)
    exponent = np.where(steps <= step, gamma, gammas)
    return (gammas + 1) * (gamma + 1) / ((gammas + gamma + 1) * last) * (first / last) ** exponent


def solve_coefficients(steps: np.ndarray, widths: np.ndarray, step: int, width: float) -> tuple[np.ndarray, float]:
    """Fit an average of width `width` at step `step` to n averages of widths `widths` (n,) at steps `steps` (n,).

    Returns the coefficients (n,), which add up to 1 and minimize the L2 distance between the profiles; and that
    distance, relative to the norm of the wanted profile.
    """
    gammas, gamma = np.array([power_exponent(one) for one in widths]), power_exponent(width)
    gram = np.stack([profile_inner_products(steps, gammas, *one) for one in zip(steps, gammas, strict=True)])
    norm = np.sqrt(profile_inner_products(np.array([step]), np.array([gamma]), step, gamma)[0])
    # Normalize the profiles to norm 1, so that the ridge is relative to the squared norm of each.
    norms = np.sqrt(np.diag(gram))
    cosines, wanted = gram / np.outer(norms, norms), profile_inner_products(steps, gammas, step, gamma) / (norms * norm)
    # The integral of each normalized profile, divided by the integral of the normalized wanted profile.
    masses = norm / norms
    solved = np.linalg.solve(cosines + RIDGE * np.eye(len(steps)), np.stack([wanted, masses], 1))
    free, shift = solved.T
    # `free` is the solution without a constraint. The Lagrange term makes the coefficients, solution * masses, add up
    # to 1.
    solution = free + (1 - masses @ free) / (masses @ shift) * shift
    squared = 1 - 2 * solution @ wanted + solution @ cosines @ solution
    return solution * masses, float(np.sqrt(max(0.0, squared)))


def fit_average(snapshots: Sequence[WeightSnapshot], step: int, width: float) -> EmaFit:
    """Fit an average of width `width` at step `step` to snapshots with power profiles.

    Uses the snapshots up to the first step at or after `step`. Some snapshot must be at `step` or later.
    """
    end = min(one.step for one in snapshots if one.step >= step)
    used = [one for one in snapshots if one.step <= end]
    steps, widths = np.array([float(one.step) for one in used]), np.array([one.spec.value for one in used])
    coefficients, error = solve_coefficients(steps, widths, step, width)
    return EmaFit(step, used, coefficients, error)


def combine_snapshots(fit: EmaFit, module: torch.nn.Module) -> StateDict:
    """Compute the state dict of a fit, for `module`, which may be on the meta device.

    Buffers are not averaged. They are copied from the snapshot that is nearest in time. Raises MachineError if a
    snapshot is damaged or does not match its hash. Raises UserError if a snapshot does not fit the module, or if a
    value is not finite.
    """
    nearest = min(fit.snapshots, key=lambda one: abs(one.step - fit.step))
    own, state = module.state_dict(), {}
    parameters = [name for name, _ in module.named_parameters() if name in own]
    # Sum in float64: coefficients can be much larger than 1, so sums in fp32 would lose digits.
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
    """Compute the average that `settings` describe, write it to a weights file or a bundle, and return the fit.

    Raises UserError if the settings or snapshots do not allow it, and MachineError if a snapshot is damaged. In both
    cases nothing is written.
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
    """Check the settings that do not depend on snapshots. Returns the run and its config, or raises UserError."""
    if (settings.width is None) == (settings.decay is None):
        raise UserError("set either width or decay: add width=0.15, or decay=NUMBER of an average in the snapshots")
    if settings.width is not None and not WIDTHS[0] <= settings.width <= WIDTHS[1]:
        raise UserError(f"width={settings.width:g}: use {WIDTHS[0]} to {WIDTHS[1]}")
    if not settings.out and not settings.bundle:
        raise UserError("nothing would be written: add out=FILE.safetensors or bundle=FOLDER")
    if settings.out and Path(settings.out).is_dir():
        raise UserError(f"out={settings.out} is a folder: name a file, or use bundle=")
    run = open_run(settings.run, settings.stage, "bundle", settings.bundle)
    return run, run.config()


def _resolve_step(snapshots: Sequence[WeightSnapshot], settings: EmaToolConfig) -> int:
    """The step of the average. Raises UserError if it is negative or after the last snapshot."""
    last = max(one.step for one in snapshots)
    if not 0 <= settings.step <= last:
        raise UserError(f"step={settings.step}: use 1 to {last}, the step of the last snapshot")
    return settings.step or last


def _fitted_average(snapshots: list[WeightSnapshot], settings: EmaToolConfig, width: float) -> EmaFit:
    """Reconstruct an average from snapshots with power profiles."""
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
    """Take an average with a constant profile from its snapshot, unchanged."""
    constant = [one for one in snapshots if one.spec.profile is EmaProfile.constant]
    same = [one for one in constant if one.spec.value == settings.decay]
    if not same:
        known = ", ".join(sorted({str(one.spec.value) for one in constant})) or "none"
        raise UserError(
            f"decay={settings.decay}: no snapshot has this decay, they have {known}: use one of these, or width="
        )
    step = _resolve_step(same, settings)
    if chosen := [one for one in same if one.step == step]:
        return EmaFit(step, chosen, np.ones(1), 0.0)
    steps = [one.step for one in same]
    raise UserError(f"step={step}: an average with constant profile exists at its snapshots only: use one of {steps}")
