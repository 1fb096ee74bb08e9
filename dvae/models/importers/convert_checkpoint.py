"""Convert a public checkpoint to a bundle.

The bundle has the tensors of the checkpoint, and the config of a recipe. Settings that the tensors determine replace
the settings of the recipe.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from dvae.config import compose as configuration
from dvae.config.schema import RunConfig, extended_run_config
from dvae.errors import UserError, fold
from dvae.models import bundle_export, components
from dvae.models.importers import diffusevae_layout as diffusevae
from dvae.models.importers import psld_layout as psld
from dvae.models.importers.checkpoint_file import Checkpoint, CheckpointTensor
from dvae.models.importers.layout_match import LayoutMatch, check_numbers
from dvae.registry.stages.base import run_config_class
from dvae.utils.weights import check_weights


class CheckpointLayout(Enum):
    """Public code that wrote the checkpoint."""

    diffusevae = "diffusevae"
    psld = "psld"


class CheckpointWeights(Enum):
    """Which weights of the checkpoint are converted."""

    ema = "ema"
    """The moving average of the weights, which published results use."""
    online = "online"
    """The weights of the last training step."""


@dataclass(kw_only=True, slots=True)
class ConvertConfig:
    """Settings of tools/convert.py: the settings of a run, and the files to convert."""

    layout: CheckpointLayout = MISSING
    """Public code that wrote the checkpoint: diffusevae or psld.

    The command line calls this field `from=`. The field has another name because `from` is a keyword of Python.
    """
    ckpt: str = MISSING
    """Path of the checkpoint file of the refiner."""
    vae: str = ""
    """Path of a checkpoint file of the VAE (empty: use the VAE in the checkpoint of the refiner)."""
    weights: CheckpointWeights = CheckpointWeights.ema
    """Weights to convert: ema (moving average) or online (last step)."""
    out: str = MISSING
    """Folder of the new bundle. It must not exist yet."""


LONGEST_SETTING = 200
"""Most characters of a setting in the printed report."""
OWN = {"layout", "ckpt", "vae", "weights", "out"}
READERS = {CheckpointLayout.diffusevae: diffusevae.read, CheckpointLayout.psld: psld.read}


def compose(words: list[str]) -> DictConfig:
    """Compose the config from the words of the command line. Raises UserError if a word is wrong or one is missing."""
    if not any(word.startswith("recipe=") for word in words):
        raise UserError("recipe is not set: name the recipe of the checkpoint's data set, for example recipe=cifar10")
    words = ["layout=" + word.removeprefix("from=") if word.startswith("from=") else word for word in words]
    types = get_type_hints(ConvertConfig)
    schema = extended_run_config([(field, types[field.name]) for field in fields(ConvertConfig)], run_config_class())
    ConfigStore.instance().store(name="convert_schema", node=schema, provider="dvae")
    config = configuration.compose("convert", words)
    needed = {"layout": "from=diffusevae or from=psld", "ckpt": "ckpt=FILE", "out": "out=FOLDER"}
    for name, word in (needed | {"image_size": "image_size=PIXELS"}).items():
        if OmegaConf.is_missing(config, name):
            raise UserError(f"{word.partition('=')[0]} is not set: add {word}")
    return config


def convert(config: DictConfig) -> list[str]:
    """Read the checkpoint and write the bundle. Nothing in the checkpoint is executed.

    Returns the lines of a report for the user. Raises UserError if a file is damaged, has another layout, is dangerous,
    or does not fit the recipe. In this case nothing is written.
    """
    out = Path(config.out)
    if out.exists() or out.is_symlink():
        raise UserError(f"out={out} is there already: name a folder that does not exist")
    recipe = _plain(config)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint(Path(config.ckpt)))
        vae = stack.enter_context(Checkpoint(Path(config.vae))) if config.vae else None
        match = READERS[config.layout](checkpoint, vae, config.weights is CheckpointWeights.ema, recipe)
        settled, changes = _settle(recipe, match)
        typed = configuration.to_run_config(OmegaConf.create(settled))
        _check(typed, match, checkpoint.path)
        lines = _say(config, settled, match, changes)
        if config.dry_run:
            return [*lines, "dry run: nothing was written"]
        for held in match.parts.values():
            check_numbers(held)
        parts = {part: _load(held) for part, held in match.parts.items()}
    parts["denoiser"] = _as_denoiser(parts["denoiser"], torch.tensor(1.0))
    bundle_export.export(out, typed, parts)
    return [*lines, f"{out}: written, a bundle for tools/sample.py run={out}"]


def _plain(config: DictConfig) -> dict[str, Any]:
    """Return the recipe's config as plain values, without the fields of the conversion and without a classifier."""
    config = config.copy()
    for key in OmegaConf.missing_keys(config):
        if key.startswith("source."):  # the location of the images is not set, and a bundle does not need it
            OmegaConf.update(config, key, "(imported)")
    plain: Any = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    kept = {key: value for key, value in plain.items() if key not in OWN}
    stages = [stage for stage in kept["stages"] if stage != "classifier"]
    return kept | {"classifier": None, "classes": [], "stages": stages, "dry_run": False}


def _settle(recipe: dict[str, Any], match: LayoutMatch) -> tuple[dict[str, Any], list[str]]:
    """Return the recipe's config, updated with the settings of the checkpoint, and a list of the changes in words.

    Raises UserError if the recipe lacks a component that the layout needs.
    """
    for kind, name in match.needs.items():
        if recipe[kind]["name"] != name:
            raise UserError(
                f"the checkpoint needs {kind}={name}, the recipe has {recipe[kind]['name']}: choose another recipe, or "
                f"add {kind}={name}"
            )
    settled = {key: dict(value) if isinstance(value, dict) else value for key, value in recipe.items()}
    settled["data"]["label"] = ""
    settled["denoiser"]["condition_label"] = False
    changes = []
    for kind, component in match.components.items():
        if component["name"] != recipe[kind]["name"]:
            changes.append(f"{kind} {recipe[kind]['name']} -> {component['name']}")
        settled[kind] = component
    for dotted, value in match.fields.items():
        *kinds, name = dotted.split(".")
        node = settled[kinds[0]] if kinds else settled
        if node.get(name) != value:
            changes.append(f"{dotted} {_short(node.get(name))} -> {_short(value)}")
        node[name] = value
    return settled, changes


def _check(config: RunConfig, match: LayoutMatch, path: Path) -> None:
    """Raise UserError if tensors are missing, surplus or of another shape. This check reads no numbers."""
    try:
        made = components.build_models_on_meta(config).trained_parts()
    except (ValueError, TypeError, ArithmeticError, LookupError, AssertionError, RuntimeError) as error:
        # the shapes come from an untrusted file, and building layers for them may fail in any way
        raise UserError(f"{path}: its tensors describe no network of dvae ({fold(error)[:200]})") from None
    for part, held in match.parts.items():
        shapes = {name: torch.empty(value.shape, device="meta") for name, value in held.items()}
        if part == "denoiser":
            shapes = _as_denoiser(shapes, torch.empty((), device="meta"))
        check_weights(made[part], shapes, f"{path} ({part})")


def _load(held: dict[str, CheckpointTensor]) -> dict[str, torch.Tensor]:
    """Load the tensors as fp32."""
    return {name: value.load().float() for name, value in held.items()}


def _as_denoiser(refiner: dict[str, torch.Tensor], data_scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the state dict of a Denoiser that contains the given refiner."""
    return {f"refiner.{name}": value for name, value in refiner.items()} | {"data_scale": data_scale}


def _say(config: DictConfig, settled: dict[str, Any], match: LayoutMatch, changes: list[str]) -> list[str]:
    """Return the lines of the report for the user.

    They list what was read, which settings of the recipe were changed, and which settings no file contains.
    """
    count = sum(len(held) for held in match.parts.values())
    told = " ".join(f"{name}={_short(value)}" for name, value in match.fields.items())
    lines = [
        f"{config.ckpt}: {config.layout.value}, {config.weights.value} weights, {count} tensors in "
        f"{' and '.join(match.parts)}",
        f"known from its tensors, or the same in all such files: {told}",
        f"changed in recipe={config.recipe} for it: {'; '.join(changes) or 'nothing'}",
        "not stored in the file, so the recipe's values are used:",
    ]
    made = OmegaConf.create(settled)
    for dotted, harm in match.unknown.items():
        value = OmegaConf.select(made, dotted)
        lines.append(f"  {dotted}={_short(value)} (if wrong: {harm})")
    return lines


def _short(value: Any) -> str:
    """Return a setting as short text. A component is followed by its settings."""
    if OmegaConf.is_dict(value):
        return str(value["name"]) + "".join(f" {key}={_short(one)}" for key, one in value.items() if key != "name")
    text = str(value).replace(" ", "")
    return text if len(text) <= LONGEST_SETTING else text[: LONGEST_SETTING - 3] + "..."
