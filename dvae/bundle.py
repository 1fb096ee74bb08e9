"""The bundle: what users run on. model.safetensors (averaged weights), config.yaml, bundle.json; no pickled code."""

from __future__ import annotations

import json
import shutil
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
from dvae.quantisation import plan as quantisation
from dvae.registry.core import KINDS, origin
from dvae.registry.encoders import Encoder
from dvae.settings import RunConfig

FORMAT = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"
ABOUT = "bundle.json"
DIRECTIONS = "directions.safetensors"
"""Directions that were found for the encoder (dvae/directions/store.py), where there are any."""
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
        kinds = {own[name].dtype, state[name].dtype}
        if len(kinds) > 1 and not all(kind.is_floating_point for kind in kinds):
            raise UserError(f"{what}: {name!r} is {state[name].dtype} in the weights, {own[name].dtype} by the config")
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


def export(
    folder: Path,
    config_yaml: str,
    parts: dict[str, dict[str, torch.Tensor]],
    quantised: quantisation.Plan | None = None,
) -> None:
    """Write a bundle of the given parts (name -> state dict), complete or absent; `quantised` says how, if they are.

    In the place of an older one it keeps that one's directions, which tell themselves whether they fit the encoder.
    """
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
        if quantised is not None:
            about["quantised"] = quantised.method
            quantisation.write(aside, quantised)
        files.write_json(aside / ABOUT, about)
        if (folder / DIRECTIONS).is_file():
            shutil.copyfile(folder / DIRECTIONS, aside / DIRECTIONS)


def verified(folder: Path) -> tuple[dict[str, Any], RunConfig]:
    """What bundle.json says, and the config. Raises UserError where a file is missing or changed."""
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
    return about, configuration.load(folder / CONFIG)


def hashes(path: str | Path) -> dict[str, str]:
    """sha256 of `weights` and `config` of a run folder's bundle, or of a bundle, as its bundle.json says."""
    said = json.loads((folder_of(path) / ABOUT).read_text(encoding="utf-8"))["sha256"]
    return {"weights": said[WEIGHTS], "config": said[CONFIG]}


def load(folder: Path) -> tuple[RunConfig, Models]:
    """Config and models of a bundle, in evaluation mode.

    Raises UserError where a file is missing or changed, or the config does not fit the weights.
    """
    about, config = verified(folder)
    return config, _models(folder, about, config)


def _models(folder: Path, about: dict[str, Any], config: RunConfig) -> Models:
    """The models of a verified bundle; `config` loses a classifier that is not there."""
    if CLASSIFIER not in about["parts"]:
        config.classifier = None  # not trained yet, or never: all else works without it
    models = build(config)
    lacking = sorted(models.trained().keys() - set(about["parts"]))
    if lacking:
        raise UserError(
            f"{folder} lacks {', '.join(lacking)}: run the stages that train it, with the command of the run"
        )
    if "quantised" in about:
        quantisation.replace_layers(models, quantisation.read(folder, about["quantised"]), str(folder))
    weights = load_weights(folder / WEIGHTS)
    for part, module in models.trained().items():
        fit(module, _part(weights, part), f"{folder} ({part})")
        module.eval().requires_grad_(False)
    quantisation.ready(models)
    return models


def refuse_quantised(what: str, about: dict[str, Any]) -> None:
    """Raise UserError where the bundle that bundle.json tells `about` is quantised: nothing is trained from that."""
    if "quantised" in about:
        raise UserError(f"{what} is quantised ({about['quantised']}): name the bundle that it was made of")


def given_encoder(config: RunConfig, encoder: Encoder) -> dict[str, torch.Tensor] | None:
    """The weights that the encoder stage takes over instead of training `encoder`; None where it trains.

    Raises UserError where they cannot be read or do not fit.
    """
    return encoder_for(config) if config.encoder_weights else encoder.pretrained()


def encoder_for(config: RunConfig) -> dict[str, torch.Tensor]:
    """The trained encoder of the run folder or bundle `config.encoder_weights`, for an encoder that is the same.

    Raises UserError where there is none, or it is another.
    """
    what = f"encoder_weights={config.encoder_weights}"
    folder = folder_of(config.encoder_weights)
    about, theirs = verified(folder)
    refuse_quantised(what, about)
    if "encoder" not in about["parts"]:
        raise UserError(f"{what} has no trained encoder: name a run whose encoder stage is finished")
    refuse_other(what, theirs, config, ("encoder",))
    return _part(load_weights(folder / WEIGHTS), "encoder")


def teacher_of(config: RunConfig) -> Models:
    """The trained models of the run folder or bundle `config.teacher`, for a run with the same networks.

    Raises UserError where they are not all there, or others.
    """
    what, folder = f"teacher={config.teacher}", folder_of(config.teacher)
    about, theirs = verified(folder)
    refuse_quantised(what, about)
    refuse_other(what, theirs, config, ("encoder", "prior", "process", "schedule", "refiner", "denoiser"))
    return _models(folder, about, theirs)


def refuse_other(what: str, theirs: RunConfig, config: RunConfig, kinds: tuple[str, ...]) -> None:
    """Raise UserError, naming the first field that differs, where the parts of two configs are not built alike."""
    there, here = _plain(theirs, kinds), _plain(config, kinds)
    for name in [*here, *(name for name in there if name not in here)]:
        if there.get(name) != here.get(name):
            raise UserError(f"{what} has {name}={there.get(name)}, this run {here.get(name)}: it is another network")


def _plain(config: RunConfig, kinds: tuple[str, ...]) -> dict[str, Any]:
    """What parts of a run are built from."""
    found: dict[str, Any] = {"image_size": config.image_size, "channels": config.channels}
    for kind in kinds:
        fields: Any = OmegaConf.to_container(OmegaConf.structured(getattr(config, kind)), enum_to_str=True)
        found |= {f"{kind}.{name}": value for name, value in fields.items()}
    return found


def _part(weights: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{part}."): value for name, value in weights.items() if name.startswith(f"{part}.")}


def folder_of(path: str | Path) -> Path:
    """The bundle of a run folder, or the bundle itself. Raises UserError where there is none."""
    folder = Path(path)
    inner = folder / "bundle"
    if inner.is_dir():
        return inner
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run or bundle")
    return folder
