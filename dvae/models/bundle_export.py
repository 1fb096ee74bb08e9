"""Write a bundle (dvae/models/bundle.py) from trained weights and the settings of a run."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from dvae.config.model_config import COMPONENT_KINDS, ComponentInfo, model_config, to_yaml
from dvae.config.schema import ModelConfig, RunConfig
from dvae.errors import UserError, printable_line
from dvae.models.bundle import (
    CLASSIFIER,
    CONFIG,
    DIRECTIONS,
    FORMAT,
    OPTIONAL_FILES,
    WEIGHTS,
    BundleInfo,
    read_info,
    verify_file,
)
from dvae.models.quantization import layer_plan
from dvae.models.quantization.layer_plan import QuantizationPlan
from dvae.registry.discovery import origin, registries
from dvae.tracking.console import say
from dvae.utils import atomic_files, package
from dvae.utils.read import DamagedFile
from dvae.utils.weights import StateDict, save_weights


def component_infos(config: ModelConfig) -> dict[str, ComponentInfo]:
    """For each kind that the model has: component name, class, and the package it comes from with its version."""
    found = {}
    for kind in COMPONENT_KINDS:
        component = getattr(config, kind)
        if component is not None:
            cls = registries()[kind].get(component.name)
            package, release = origin(cls)
            found[kind] = ComponentInfo(component.name, f"{cls.__module__}.{cls.__qualname__}", package, release)
    return found


def export(
    folder: Path,
    config: RunConfig | ModelConfig,
    parts: dict[str, StateDict],
    quantized: QuantizationPlan | None = None,
) -> None:
    """Write a bundle of the given parts (name -> state dict), complete or absent; `quantized` says how, if they are.

    If it replaces an older bundle, it keeps that one's directions, which tell themselves whether they fit the encoder.
    Directions that do not match their hash in the older bundle are left out, and a line says so.
    """
    tensors = {f"{part}.{name}": value for part, state in parts.items() for name, value in state.items()}
    kept = model_config(config) if isinstance(config, RunConfig) else config
    if CLASSIFIER not in parts:
        kept = replace(kept, classifier=None)
    with atomic_files.new_folder(folder) as aside:
        save_weights(aside / WEIGHTS, tensors)
        atomic_files.write_text(aside / CONFIG, to_yaml(kept))
        if quantized is not None:
            layer_plan.write_plan(aside, quantized)
        _copy_directions(folder, aside)
        written = [name for name in (WEIGHTS, CONFIG, *OPTIONAL_FILES) if (aside / name).exists()]
        BundleInfo(
            format=FORMAT,
            dvae=package.VERSION,
            parts=sorted(parts),
            components=component_infos(kept),
            sha256={name: atomic_files.sha256(aside / name) for name in written},
            quantized="" if quantized is None else quantized.method,
        ).write(aside)


def _copy_directions(old: Path, new: Path) -> None:
    """Copy the directions of the bundle `old`, if it has any, into `new`, which will vouch for them with a hash.

    So the copy must match the hash that `old` has of them; a link is not followed. Else they are left out.
    """
    path = old / DIRECTIONS
    if not os.path.lexists(path):
        return
    try:
        if path.is_symlink():
            raise DamagedFile(path, "is a link, not a file")
        info = read_info(old)
        verify_file(old, info, DIRECTIONS)
        shutil.copyfile(path, new / DIRECTIONS)
        verify_file(new, info, DIRECTIONS)  # again: it may have changed meanwhile
    except (UserError, DamagedFile, OSError) as error:
        (new / DIRECTIONS).unlink(missing_ok=True)
        say(f"the new bundle has no directions, find them again: {printable_line(error)}")


def update_hash(folder: Path, name: str) -> None:
    """Enter the hash of the file `name`, which was written into a bundle after its export."""
    info = read_info(folder)
    info.sha256[name] = atomic_files.sha256(folder / name)
    info.write(folder)
