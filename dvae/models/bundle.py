"""The bundle: a folder that users run and share. It is data: loading one never executes or opens anything else.

model.safetensors        averaged weights of all parts
config.yaml              what inference needs of the run's settings (dvae/config/model_config.py)
bundle.json              format, parts, component classes and versions, hashes of every file here, and its own hash
quantization.json        which layers are stored in fewer bytes, if any
directions.safetensors   directions of the latent space, if some were found
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dvae.config.model_config import COMPONENT_KINDS, ComponentInfo, model_config, read_model_config, to_yaml
from dvae.config.schema import ModelConfig, RunConfig
from dvae.errors import UserError, printable_line
from dvae.models import components
from dvae.models.components import Models
from dvae.models.quantization import layer_plan as quantization
from dvae.registry.discovery import origin, registries
from dvae.registry.encoders.base import Encoder
from dvae.tracking.console import say
from dvae.utils import atomic_files, package
from dvae.utils.format_version import refuse_format
from dvae.utils.read import (
    JSON_LIMIT,
    MIB,
    YAML_LIMIT,
    DamagedFile,
    forbid_extra,
    read_json,
    read_weights_header,
    require_regular,
)
from dvae.utils.weights import (
    State,
    check_weights,
    fit_weights,
    load_weights,
    part_of,
    refuse_nonfinite,
    save_weights,
    without_numbers,
)

FORMAT = 2
READERS = {1: "dvae 0.1"}
"""Older formats, and the version of dvae that reads each."""
WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"
ABOUT = "bundle.json"
DIRECTIONS = "directions.safetensors"
"""Directions that were found for the encoder (dvae/inference/directions/direction_files.py), if there are any."""
OPTIONAL_FILES = (quantization.FILE, DIRECTIONS)
CLASSIFIER = "classifier"
"""The part that a bundle may lack."""
AGAIN = "get a new copy of the bundle, or export it again"


@forbid_extra
@dataclass(kw_only=True)
class About:
    """The content of bundle.json."""

    format: int
    dvae: str
    parts: list[str]
    components: dict[str, ComponentInfo]
    sha256: dict[str, str]
    """Of each other file of the bundle."""
    quantized: str = ""
    """A method of quantization; empty: none."""
    self_sha256: str = field(default="")
    """Of all the fields above."""

    def digest(self) -> str:
        """The hash of all fields but itself."""
        told = {name: value for name, value in asdict(self).items() if name != "self_sha256"}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write bundle.json into `folder`, with its own hash."""
        self.self_sha256 = self.digest()
        atomic_files.write_json(folder / ABOUT, asdict(self))


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
    parts: dict[str, State],
    quantized: quantization.Plan | None = None,
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
            quantization.write(aside, quantized)
        _copy_directions(folder, aside)
        written = [name for name in (WEIGHTS, CONFIG, *OPTIONAL_FILES) if (aside / name).exists()]
        About(
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
        about = read_about(old)
        verify_file(old, about, DIRECTIONS)
        shutil.copyfile(path, new / DIRECTIONS)
        verify_file(new, about, DIRECTIONS)  # again: it may have changed meanwhile
    except (UserError, DamagedFile, OSError) as error:
        (new / DIRECTIONS).unlink(missing_ok=True)
        say(f"the new bundle has no directions, find them again: {printable_line(error)}")


def update_hash(folder: Path, name: str) -> None:
    """Enter the hash of the file `name`, which was written into a bundle after its export."""
    about = read_about(folder)
    about.sha256[name] = atomic_files.sha256(folder / name)
    about.write(folder)


def read_about(folder: Path) -> About:
    """What bundle.json says. Raises UserError if it is missing, damaged, changed, or of another format version."""
    path = folder / ABOUT
    try:
        head = read_json(path, dict[str, Any], limit=MIB)
        refuse_format("bundle", folder, head.get("format"), FORMAT, READERS)
        about = read_json(path, About, limit=MIB)
    except FileNotFoundError:
        raise UserError(
            f"{folder}: not a run folder with a bundle, and not a whole bundle ({ABOUT} is missing): name another "
            "folder, or copy the bundle again"
        ) from None
    except DamagedFile as error:
        raise UserError(f"{error}: {AGAIN}") from None
    if about.digest() != about.self_sha256:
        raise UserError(f"{path} does not match its own hash: the file is damaged or was edited, copy it again")
    return about


def verified(folder: Path) -> tuple[About, ModelConfig]:
    """What bundle.json says, and the settings.

    Raises UserError if a file is missing or differs from its hash, and for settings that are no plain model.
    """
    about = read_about(folder)
    needed = [WEIGHTS, CONFIG] + ([quantization.FILE] if about.quantized else [])
    for name in needed:
        verify_file(folder, about, name)
    return about, read_model_config(folder / CONFIG, about.components)


def verify_file(folder: Path, about: About, name: str) -> None:
    """Raise UserError if the file `name` of a bundle is missing, is no file, or differs from its hash."""
    if name not in about.sha256:
        raise UserError(f"{folder / ABOUT} holds no hash of {name}: {AGAIN}")
    try:
        require_size(folder / name)
        found = atomic_files.sha256(folder / name)
    except FileNotFoundError:
        raise UserError(f"{folder}: not a whole bundle ({name} is missing): {AGAIN}") from None
    except DamagedFile as error:
        raise UserError(f"{error}: {AGAIN}") from None
    if found != about.sha256[name]:
        raise UserError(
            f"{folder / name} does not match the hash in {ABOUT}: it was damaged or edited; copy the bundle again, and "
            "change settings on the command line"
        )


def require_size(path: Path) -> None:
    """Raise DamagedFile for a file that is larger than its kind may be: to hash it could take for ever."""
    if path.suffix == ".safetensors":
        read_weights_header(path)
    elif (size := require_regular(path).st_size) > (YAML_LIMIT if path.name == CONFIG else JSON_LIMIT):
        raise DamagedFile(path, f"has {size} bytes, more than such a file may have")


def hashes(path: str | Path) -> dict[str, str]:
    """sha256 of `weights` and `config` of a run folder's bundle, or of a bundle, as its bundle.json says."""
    said = read_about(folder_of(path)).sha256
    return {"weights": said.get(WEIGHTS, ""), "config": said.get(CONFIG, "")}


def load(folder: Path) -> tuple[ModelConfig, Models]:
    """Settings and models of a bundle, in evaluation mode.

    The networks are first built without memory and compared with the header of the weights. Raises UserError if a file
    is missing or changed, if the settings do not fit the weights, and for weights with NaN or infinity.
    """
    about, config = verified(folder)
    return config, _models(folder, about, config)


def _models(folder: Path, about: About, config: ModelConfig) -> Models:
    """The models of a verified bundle; `config` loses a classifier that is not there."""
    if CLASSIFIER not in about.parts:
        config.classifier = None  # not trained yet, or never: all else works without it
    plan = quantization.read(folder, about.quantized) if about.quantized else None
    _check_shapes(folder, about, config, plan)
    made = components.build(config)
    if plan is not None:
        quantization.replace_layers(made, plan, str(folder))
    weights = load_weights(folder / WEIGHTS)
    refuse_nonfinite(weights, str(folder / WEIGHTS))
    for part, module in made.trained().items():
        fit_weights(module, part_of(weights, part), f"{folder} ({part})")
        module.eval().requires_grad_(False)
    quantization.ready(made)
    return made


def _check_shapes(folder: Path, about: About, config: ModelConfig, plan: quantization.Plan | None) -> None:
    """Raise UserError if the networks of `config` are not those of the weights, before memory is taken for either."""
    try:
        header = without_numbers(read_weights_header(folder / WEIGHTS))
    except DamagedFile as error:
        raise UserError(f"{error}: {AGAIN}") from None
    try:
        with components.on_meta_device(len(header)):
            made = components.build(config, seed_weights=False)
            if plan is not None:
                quantization.replace_layers(made, plan, str(folder))
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    lacking = sorted(made.trained().keys() - set(about.parts))
    if lacking:
        raise UserError(
            f"{folder} lacks {', '.join(lacking)}: run the stages that train it, with the command of the run"
        )
    for part, module in made.trained().items():
        check_weights(module, part_of(header, part), f"{folder} ({part})")


def refuse_quantized(what: str, about: About) -> None:
    """Raise UserError for a quantized bundle: nothing is trained from one."""
    if about.quantized:
        raise UserError(f"{what} is quantized ({about.quantized}): name the bundle that it was made of")


def given_encoder(config: RunConfig, encoder: Encoder) -> State | None:
    """The weights that the encoder stage takes over instead of training `encoder`; None if it trains.

    Raises UserError if they cannot be read or do not fit.
    """
    return encoder_for(config) if config.encoder_weights else encoder.pretrained()


def encoder_for(config: RunConfig) -> State:
    """The trained encoder of the run folder or bundle `config.encoder_weights`, for an encoder that is the same.

    Raises UserError if there is none, or it is another.
    """
    what = f"encoder_weights={config.encoder_weights}"
    folder = folder_of(config.encoder_weights)
    about, theirs = verified(folder)
    refuse_quantized(what, about)
    if "encoder" not in about.parts:
        raise UserError(f"{what} has no trained encoder: name a run whose encoder stage is finished")
    refuse_other(what, theirs, config, ("encoder",))
    weights = part_of(load_weights(folder / WEIGHTS), "encoder")
    refuse_nonfinite(weights, str(folder / WEIGHTS))
    return weights


def teacher_of(config: RunConfig) -> Models:
    """The trained models of the run folder or bundle `config.teacher`, for a run with the same networks.

    Raises UserError if they are not all there, or others.
    """
    what, folder = f"teacher={config.teacher}", folder_of(config.teacher)
    about, theirs = verified(folder)
    refuse_quantized(what, about)
    refuse_other(what, theirs, config, ("encoder", "prior", "process", "schedule", "refiner", "denoiser"))
    return _models(folder, about, theirs)


def refuse_other(what: str, theirs: ModelConfig, config: RunConfig, kinds: tuple[str, ...]) -> None:
    """Raise UserError, naming the first field that differs, if the parts of two configs are not built alike."""
    there, here = _plain(theirs, kinds), _plain(model_config(config), kinds)
    for name in [*here, *(name for name in there if name not in here)]:
        if there.get(name) != here.get(name):
            raise UserError(f"{what} has {name}={there.get(name)}, this run {here.get(name)}: it is another network")


def _plain(config: ModelConfig, kinds: tuple[str, ...]) -> dict[str, Any]:
    """What parts of a run are built from."""
    found: dict[str, Any] = {"image_size": config.image_size, "channels": config.channels}
    for kind in kinds:
        fields: Any = OmegaConf.to_container(OmegaConf.structured(getattr(config, kind)), enum_to_str=True)
        found |= {f"{kind}.{name}": value for name, value in fields.items()}
    return found


def folder_of(path: str | Path) -> Path:
    """The bundle of a run folder, or the bundle itself. Raises UserError if there is none."""
    folder = Path(path)
    inner = folder / "bundle"
    if inner.is_dir():
        return inner
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run or bundle")
    return folder
