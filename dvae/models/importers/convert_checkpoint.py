"""A public checkpoint to a bundle: the recipe's config, corrected by what the tensors tell, and the tensors."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from dvae.config import compose as configuration
from dvae.config.schema import RunConfig
from dvae.errors import UserError, fold
from dvae.models import bundle_export, components
from dvae.models.importers import diffusevae_layout as diffusevae
from dvae.models.importers import psld_layout as psld
from dvae.models.importers.checkpoint_file import Checkpoint, CheckpointTensor
from dvae.models.importers.layout_match import LayoutMatch, check_numbers
from dvae.utils.weights import check_weights


class CheckpointLayout(Enum):
    """Whose code wrote the checkpoint."""

    diffusevae = "diffusevae"
    psld = "psld"


class CheckpointWeights(Enum):
    """Which of the weights are taken."""

    ema = "ema"
    """Their moving average, which published figures are of."""
    online = "online"
    """Those of the last step."""


@dataclass(kw_only=True, slots=True)
class ConvertConfig(RunConfig):
    """What tools/convert.py takes: a run's settings, and where to convert from and to."""

    layout: CheckpointLayout = MISSING
    """`from=` on the command line (a word of Python, so no field can have that name)."""
    ckpt: str = MISSING
    """The checkpoint file of the refiner."""
    vae: str = ""
    """A checkpoint file of the VAE (empty: the VAE that the refiner's has in it)."""
    weights: CheckpointWeights = CheckpointWeights.ema
    """ema or online."""
    out: str = MISSING
    """The bundle: a folder that does not exist yet."""


ConfigStore.instance().store(name="convert_schema", node=ConvertConfig, provider="dvae")
LONGEST_SETTING = 200
"""Characters of a setting in what a user is told."""
OWN = {"layout", "ckpt", "vae", "weights", "out"}
READERS = {CheckpointLayout.diffusevae: diffusevae.read, CheckpointLayout.psld: psld.read}


def compose(words: list[str]) -> DictConfig:
    """The config of the command line's words. Raises UserError on a wrong one, and without a recipe."""
    if not any(word.startswith("recipe=") for word in words):
        raise UserError("recipe is not set: name that of the checkpoint's data, for example recipe=cifar10")
    words = ["layout=" + word.removeprefix("from=") if word.startswith("from=") else word for word in words]
    config = configuration.compose("convert", words)
    needed = {"layout": "from=diffusevae or from=psld", "ckpt": "ckpt=FILE", "out": "out=FOLDER"}
    for name, word in (needed | {"image_size": "image_size=PIXELS"}).items():
        if OmegaConf.is_missing(config, name):
            raise UserError(f"{word.partition('=')[0]} is not set: add {word}")
    return config


def convert(config: DictConfig) -> list[str]:
    """Read the checkpoint and write the bundle. Returns what a user should know of it, line by line.

    Raises UserError where a file is damaged, of another layout or dangerous, or does not fit the recipe; nothing is
    written then, and nothing in a file is ever executed.
    """
    out = Path(config.out)
    if out.exists() or out.is_symlink():
        raise UserError(f"out={out} is there already: name a folder that is not")
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
    """The recipe's config without the words of the conversion."""
    config = config.copy()
    for key in OmegaConf.missing_keys(config):
        if key.startswith("source."):  # where the images lie, which a bundle does not need
            OmegaConf.update(config, key, "(imported)")
    plain: Any = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    kept = {key: value for key, value in plain.items() if key not in OWN}
    stages = [stage for stage in kept["stages"] if stage != "classifier"]
    return kept | {"classifier": None, "classes": [], "stages": stages, "dry_run": False}


def _settle(recipe: dict[str, Any], match: LayoutMatch) -> tuple[dict[str, Any], list[str]]:
    """The recipe's config with what was found in its place, and the changes in words.

    Raises UserError where the recipe lacks a component that the layout needs.
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
    """Refuse tensors that are missing, surplus or of another shape, before any is read."""
    try:
        made = components.build_models_on_meta(config).trained_parts()
    except (ValueError, TypeError, ArithmeticError, LookupError, AssertionError, RuntimeError) as error:
        # the shapes are a stranger's: layers made for them may fail in any way
        raise UserError(f"{path}: its tensors describe no network of dvae ({fold(error)[:200]})") from None
    for part, held in match.parts.items():
        shapes = {name: torch.empty(value.shape, device="meta") for name, value in held.items()}
        if part == "denoiser":
            shapes = _as_denoiser(shapes, torch.empty((), device="meta"))
        check_weights(made[part], shapes, f"{path} ({part})")


def _load(held: dict[str, CheckpointTensor]) -> dict[str, torch.Tensor]:
    """The tensors, fp32."""
    return {name: value.load().float() for name, value in held.items()}


def _as_denoiser(refiner: dict[str, torch.Tensor], data_scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state dict of dvae's Denoiser around that of a refiner."""
    return {f"refiner.{name}": value for name, value in refiner.items()} | {"data_scale": data_scale}


def _say(config: DictConfig, settled: dict[str, Any], match: LayoutMatch, changes: list[str]) -> list[str]:
    """What was read, what of the recipe was changed for it, and what no file tells."""
    count = sum(len(held) for held in match.parts.values())
    told = " ".join(f"{name}={_short(value)}" for name, value in match.fields.items())
    lines = [
        f"{config.ckpt}: {config.layout.value}, {config.weights.value} weights, {count} tensors in "
        f"{' and '.join(match.parts)}",
        f"known from its tensors, or the same in all such files: {told}",
        f"changed in recipe={config.recipe} for it: {'; '.join(changes) or 'nothing'}",
        "in no tensor, so as the recipe says:",
    ]
    made = OmegaConf.create(settled)
    for dotted, harm in match.unknown.items():
        value = OmegaConf.select(made, dotted)
        lines.append(f"  {dotted}={_short(value)} (if wrong: {harm})")
    return lines


def _short(value: Any) -> str:
    """A setting in few characters; a component with its settings."""
    if OmegaConf.is_dict(value):
        return str(value["name"]) + "".join(f" {key}={_short(one)}" for key, one in value.items() if key != "name")
    text = str(value).replace(" ", "")
    return text if len(text) <= LONGEST_SETTING else text[: LONGEST_SETTING - 3] + "..."
