"""The bundle: what users run on. model.safetensors (averaged weights), config.yaml, bundle.json; no pickled code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dvae import __version__, files
from dvae import config as configuration
from dvae.errors import MachineError, UserError, one_line
from dvae.models import Models, build
from dvae.registry.core import KINDS, origin
from dvae.settings import RunConfig

FORMAT = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"
ABOUT = "bundle.json"
CLASSIFIER = "classifier"
"""The part that a bundle may lack."""


def save_weights(path: Path, state: dict[str, torch.Tensor]) -> None:
    """A state dict as safetensors, complete or absent."""
    tensors = {name: value.detach().contiguous().cpu() for name, value in state.items()}
    try:
        files.write_file(path, lambda aside: save_file(tensors, aside))
    except SafetensorError as error:
        raise MachineError(f"{path} could not be written ({one_line(error)}): make room, then run it again") from None


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file; nothing in it is executed."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable weights file ({one_line(error)})") from None


def fit(module: torch.nn.Module, state: dict[str, torch.Tensor], what: str) -> None:
    """Load `state` into `module`. Raises UserError naming the first tensor that does not fit."""
    own = module.state_dict()
    for name in sorted(own.keys() | state.keys()):
        if name not in state:
            raise UserError(
                f"{what}: the weights lack {name!r}, which the config asks for: they belong to another config"
            )
        if name not in own:
            raise UserError(f"{what}: the weights hold {name!r}, which the config has no place for")
        if own[name].shape != state[name].shape:
            raise UserError(
                f"{what}: {name!r} is {tuple(state[name].shape)} in the weights and {tuple(own[name].shape)} by the "
                "config: they belong to different runs"
            )
    module.load_state_dict(state)


def component_versions(config: RunConfig) -> dict[str, dict[str, str]]:
    """For each kind that the run has: component name, class, and the package it comes from with its version."""
    about = {}
    for kind, registry in KINDS.items():
        component = getattr(config, kind)
        if component is None:
            continue
        name, cls = component.name, registry.get(component.name)
        package, release = origin(cls)
        about[kind] = {
            "name": name,
            "class": f"{cls.__module__}.{cls.__qualname__}",
            "package": package,
            "version": release,
        }
    return about


def export(folder: Path, config_yaml: str, parts: dict[str, dict[str, torch.Tensor]]) -> None:
    """Write a bundle of the given parts (name -> state dict), complete or absent."""
    tensors = {f"{part}.{name}": value for part, state in parts.items() for name, value in state.items()}
    with files.new_folder(folder) as aside:
        save_weights(aside / WEIGHTS, tensors)
        config = OmegaConf.create(config_yaml)
        config.launcher = None  # how it was trained is nothing to who uses it, who may not have that launcher
        files.write_text(aside / CONFIG, OmegaConf.to_yaml(config))
        about: dict[str, Any] = {
            "format": FORMAT,
            "dvae": __version__,
            "parts": sorted(parts),
            "components": component_versions(configuration.load(aside / CONFIG)),
            "sha256": {name: files.sha256(aside / name) for name in (WEIGHTS, CONFIG)},
        }
        files.write_json(aside / ABOUT, about)


def load(folder: Path) -> tuple[RunConfig, Models]:
    """Config and models of a bundle, in evaluation mode.

    Raises UserError where a file is missing or changed, or the config does not fit the weights.
    """
    for name in (ABOUT, CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: not a whole bundle ({name} is missing): export it again")
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / ABOUT}: not readable ({one_line(error)}): export the bundle again") from None
    if about.get("format") != FORMAT:
        raise UserError(f"{folder}: bundle format {about.get('format')}, this dvae reads {FORMAT}: export it again")
    if files.sha256(folder / WEIGHTS) != about["sha256"][WEIGHTS]:
        raise UserError(f"{folder / WEIGHTS} does not match the hash in {ABOUT}: the file is damaged, copy it again")
    config = configuration.load(folder / CONFIG)
    if CLASSIFIER not in about["parts"]:
        config.classifier = None  # not trained yet, or never: all else works without it
    models = build(config)
    lacking = sorted(models.trained().keys() - set(about["parts"]))
    if lacking:
        raise UserError(
            f"{folder} lacks {', '.join(lacking)}: run the stages that train it, with the command of the run"
        )
    weights = load_weights(folder / WEIGHTS)
    for part, module in models.trained().items():
        state = {name.removeprefix(f"{part}."): value for name, value in weights.items() if name.startswith(f"{part}.")}
        fit(module, state, f"{folder} ({part})")
        module.eval().requires_grad_(False)
    return config, models
