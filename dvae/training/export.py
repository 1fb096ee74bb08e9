"""Export a checkpoint as a bundle. This takes one process on any machine, and no GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from dvae.config.schema import RunConfig
from dvae.errors import UserError, suggest
from dvae.models import bundle, bundle_export, components
from dvae.registry.stages.base import exported_parts
from dvae.runs.folder import Run
from dvae.training.engine.ema import MAIN
from dvae.training.engine.fragments import WEIGHT, SavedEngine
from dvae.training.resilience.checkpoint import Checkpoints
from dvae.utils.weights import StateDict


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """Settings of tools/export.py."""

    run: str = MISSING
    """Run folder."""
    out: str = MISSING
    """Folder of the bundle to write. It must not exist."""
    stage: str = "refiner"
    """Stage whose checkpoint is exported: encoder, refiner or classifier."""
    step: int = 0
    """Training step of the checkpoint (0: the newest)."""
    average: bool = True
    """Whether to export the averaged weights (EMA). False: the weights themselves."""
    plugins: list[str] = field(default_factory=list)
    """Python modules to import first. They register components."""


ConfigStore.instance().store(name="export_schema", node=ExportConfig, provider="dvae")


def export(settings: ExportConfig) -> int:
    """Write the bundle and return the step of the checkpoint.

    Raises UserError if the run has no such checkpoint, or lacks another part of the model. Raises MachineError if the
    checkpoint is damaged.
    """
    run = open_run(settings.run, settings.stage, "out", settings.out)
    config = run.config()
    checkpoints = Checkpoints(run.checkpoints(settings.stage), keep=0)
    steps = checkpoints.steps()
    if not steps or (settings.step and settings.step not in steps):
        raise UserError(
            f"run={settings.run} has no checkpoint of its {settings.stage} at step={settings.step}: it has {steps}"
        )
    step = settings.step or steps[-1]
    saved = SavedEngine(checkpoints.verified_folder(step) / settings.stage)
    # A checkpoint from before the first step has no optimizer states, so it has no average.
    kind = MAIN if settings.average and any(saved.kinds.values()) else WEIGHT
    export_with_part(run, config, exported_parts()[settings.stage], saved.state_dict(kind), Path(settings.out))
    return step


def open_run(run: str, stage: str, out_key: str, out: str) -> Run:
    """Open the run in the folder `run`.

    Raises UserError if there is no run, if no stage named `stage` exports weights, or if `out` exists. `out_key` is the
    name of the setting that holds `out`, for the error message.
    """
    if stage not in exported_parts():
        raise UserError(f"unknown stage {stage!r}: {suggest(stage, exported_parts())}")
    if out and Path(out).exists():
        raise UserError(f"{out_key}={out} is there already: name a folder that is not")
    found = Run(Path(run))
    if not found.config_file.exists():
        raise UserError(f"run={run}: no run is there: name a run folder")
    return found


def export_with_part(run: Run, config: RunConfig, part: str, weights: StateDict, folder: Path) -> None:
    """Write a bundle with the weights of the run's finished stages, and with `weights` for the part `part`.

    Raises UserError if another part, except the classifier, has not been trained yet.
    """
    trained = components.build_models_on_meta(config).trained_parts()
    finished = [name for name in trained if name != part and run.has_weights(name)]
    missing = sorted(trained.keys() - {*finished, part, bundle.CLASSIFIER})
    if missing:
        raise UserError(f"run={run.path} has no trained {missing[0]} yet, which a bundle needs: train that first")
    bundle_export.export(folder, config, {name: run.load_weights(name) for name in finished} | {part: weights})
