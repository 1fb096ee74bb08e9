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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dvae.config.model_config import ComponentInfo, read_model_config
from dvae.config.schema import ModelConfig
from dvae.errors import UserError
from dvae.models import components
from dvae.models.components import RunModels
from dvae.models.quantization import layer_plan
from dvae.models.quantization.layer_plan import QuantizationPlan
from dvae.utils import atomic_files
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
from dvae.utils.weights import check_weights, fit_weights, load_weights, part_of, refuse_nonfinite, without_numbers

FORMAT = 2
READERS = {1: "dvae 0.1"}
"""Older formats, and the version of dvae that reads each."""
WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"
INFO = "bundle.json"
DIRECTIONS = "directions.safetensors"
"""Directions that were found for the encoder (dvae/inference/directions/direction_files.py), if there are any."""
OPTIONAL_FILES = (layer_plan.FILE, DIRECTIONS)
CLASSIFIER = "classifier"
"""The part that a bundle may lack."""
COPY_AGAIN = "get a new copy of the bundle, or export it again"


@forbid_extra
@dataclass(kw_only=True)
class BundleInfo:
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
        hashed = {name: value for name, value in asdict(self).items() if name != "self_sha256"}
        return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write bundle.json into `folder`, with its own hash."""
        self.self_sha256 = self.digest()
        atomic_files.write_json(folder / INFO, asdict(self))


def read_info(folder: Path) -> BundleInfo:
    """What bundle.json says. Raises UserError if it is missing, damaged, changed, or of another format version."""
    path = folder / INFO
    try:
        head = read_json(path, dict[str, Any], limit=MIB)
        refuse_format("bundle", folder, head.get("format"), FORMAT, READERS)
        info = read_json(path, BundleInfo, limit=MIB)
    except FileNotFoundError:
        raise UserError(
            f"{folder}: not a run folder with a bundle, and not a whole bundle ({INFO} is missing): name another "
            "folder, or copy the bundle again"
        ) from None
    except DamagedFile as error:
        raise UserError(f"{error}: {COPY_AGAIN}") from None
    if info.digest() != info.self_sha256:
        raise UserError(f"{path} does not match its own hash: the file is damaged or was edited, copy it again")
    return info


def read_verified(folder: Path) -> tuple[BundleInfo, ModelConfig]:
    """What bundle.json says, and the settings.

    Raises UserError if a file is missing or differs from its hash, and for settings that are no plain model.
    """
    info = read_info(folder)
    needed = [WEIGHTS, CONFIG] + ([layer_plan.FILE] if info.quantized else [])
    for name in needed:
        verify_file(folder, info, name)
    return info, read_model_config(folder / CONFIG, info.components)


def verify_file(folder: Path, info: BundleInfo, name: str) -> None:
    """Raise UserError if the file `name` of a bundle is missing, is no file, or differs from its hash."""
    if name not in info.sha256:
        raise UserError(f"{folder / INFO} holds no hash of {name}: {COPY_AGAIN}")
    try:
        require_size(folder / name)
        found = atomic_files.sha256(folder / name)
    except FileNotFoundError:
        raise UserError(f"{folder}: not a whole bundle ({name} is missing): {COPY_AGAIN}") from None
    except DamagedFile as error:
        raise UserError(f"{error}: {COPY_AGAIN}") from None
    if found != info.sha256[name]:
        raise UserError(
            f"{folder / name} does not match the hash in {INFO}: it was damaged or edited; copy the bundle again, and "
            "change settings on the command line"
        )


def require_size(path: Path) -> None:
    """Raise DamagedFile for a file that is larger than its kind may be: to hash it could take for ever."""
    if path.suffix == ".safetensors":
        read_weights_header(path)
    elif (size := require_regular(path).st_size) > (YAML_LIMIT if path.name == CONFIG else JSON_LIMIT):
        raise DamagedFile(path, f"has {size} bytes, more than such a file may have")


def read_hashes(path: str | Path) -> dict[str, str]:
    """sha256 of `weights` and `config` of a run folder's bundle, or of a bundle, as its bundle.json says."""
    recorded = read_info(find_bundle(path)).sha256
    return {"weights": recorded.get(WEIGHTS, ""), "config": recorded.get(CONFIG, "")}


def load(folder: Path) -> tuple[ModelConfig, RunModels]:
    """Settings and models of a bundle, in evaluation mode.

    The networks are first built without memory and compared with the header of the weights. Raises UserError if a file
    is missing or changed, if the settings do not fit the weights, and for weights with NaN or infinity.
    """
    info, config = read_verified(folder)
    return config, build_verified(folder, info, config)


def build_verified(folder: Path, info: BundleInfo, config: ModelConfig) -> RunModels:
    """The models of a read_verified bundle; `config` loses a classifier that is not there."""
    if CLASSIFIER not in info.parts:
        config.classifier = None  # not trained yet, or never: all else works without it
    plan = layer_plan.read_plan(folder, info.quantized) if info.quantized else None
    _check_shapes(folder, info, config, plan)
    models = components.build_models(config)
    if plan is not None:
        layer_plan.replace_layers(models, plan, str(folder))
    weights = load_weights(folder / WEIGHTS)
    refuse_nonfinite(weights, str(folder / WEIGHTS))
    for part, module in models.trained_parts().items():
        fit_weights(module, part_of(weights, part), f"{folder} ({part})")
        module.eval().requires_grad_(False)
    layer_plan.prepare_layers(models)
    return models


def _check_shapes(folder: Path, info: BundleInfo, config: ModelConfig, plan: QuantizationPlan | None) -> None:
    """Raise UserError if the networks of `config` are not those of the weights, before memory is taken for either."""
    try:
        header = without_numbers(read_weights_header(folder / WEIGHTS))
    except DamagedFile as error:
        raise UserError(f"{error}: {COPY_AGAIN}") from None
    try:
        with components.meta_device(len(header)):
            models = components.build_models(config, seed_weights=False)
            if plan is not None:
                layer_plan.replace_layers(models, plan, str(folder))
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    lacking = sorted(models.trained_parts().keys() - set(info.parts))
    if lacking:
        raise UserError(
            f"{folder} lacks {', '.join(lacking)}: run the stages that train it, with the command of the run"
        )
    for part, module in models.trained_parts().items():
        check_weights(module, part_of(header, part), f"{folder} ({part})")


def refuse_quantized(what: str, info: BundleInfo) -> None:
    """Raise UserError for a quantized bundle: nothing is trained from one."""
    if info.quantized:
        raise UserError(f"{what} is quantized ({info.quantized}): name the bundle that it was made of")


def find_bundle(path: str | Path) -> Path:
    """The bundle of a run folder, or the bundle itself. Raises UserError if there is none."""
    folder = Path(path)
    inner = folder / "bundle"
    if inner.is_dir():
        return inner
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run or bundle")
    return folder
