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
    """Return for each kind in the model: the name and class of its component, and its package with the version."""
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
    """Write a bundle. After an interruption the folder is either complete or unchanged.

    If the folder already has a bundle, its directions are copied into the new bundle. The file of directions contains a
    hash of the encoder's weights, so commands that read it detect directions of another encoder. Directions that do not
    match their hash in the older bundle are left out, and a message is printed.

    Args:
        folder: Folder of the bundle.
        config: Settings of the run or of the model.
        parts: Name of the part -> its state dict.
        quantized: Plan of the quantization, if the parts are quantized.
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
    """Copy the directions of the bundle `old`, if it has any, into the new bundle `new`.

    The new bundle gets a hash of the copy, so a damaged copy would look valid. Therefore the copy must match the hash
    in `old`, and links are not followed. If a check fails, a message is printed and the directions are left out.
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
        verify_file(new, info, DIRECTIONS)  # the original may have changed after the first check
    except (UserError, DamagedFile, OSError) as error:
        (new / DIRECTIONS).unlink(missing_ok=True)
        say(f"the new bundle has no directions, find them again: {printable_line(error)}")


def update_hash(folder: Path, name: str) -> None:
    """Update bundle.json with the hash of the file `name`, which was written into the bundle after its export."""
    info = read_info(folder)
    info.sha256[name] = atomic_files.sha256(folder / name)
    info.write(folder)
