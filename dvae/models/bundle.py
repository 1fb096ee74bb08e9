"""The bundle: a folder with a trained model, for inference and for sharing.

A bundle contains data only. Loading it executes no code from it, and opens no files outside it.

model.safetensors        averaged weights (EMA) of all parts
config.yaml              the settings of the run that inference needs (dvae/config/model_config.py)
bundle.json              format, parts, component classes and versions, hashes of all other files, and its own hash
quantization.json        formats of the quantized layers, if the bundle is quantized
directions.safetensors   directions in latent space, if they were computed
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
"""Older format -> version of dvae that reads it."""
WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"
INFO = "bundle.json"
DIRECTIONS = "directions.safetensors"
"""Optional file of directions in the encoder's latent space (dvae/inference/directions/direction_files.py)."""
OPTIONAL_FILES = (layer_plan.FILE, DIRECTIONS)
CLASSIFIER = "classifier"
"""Name of the part that is optional in a bundle."""
COPY_AGAIN = "get a new copy of the bundle, or export it again"


@forbid_extra
@dataclass(kw_only=True)
class BundleInfo:
    """Content of bundle.json."""

    format: int
    dvae: str
    parts: list[str]
    components: dict[str, ComponentInfo]
    sha256: dict[str, str]
    """Name of each other file of the bundle -> its sha256."""
    quantized: str = ""
    """Method of quantization (empty: not quantized)."""
    self_sha256: str = field(default="")
    """sha256 of all fields above, see `digest`."""

    def digest(self) -> str:
        """Return the sha256 of all fields except `self_sha256`."""
        hashed = {name: value for name, value in asdict(self).items() if name != "self_sha256"}
        return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Set `self_sha256` and write bundle.json into `folder`."""
        self.self_sha256 = self.digest()
        atomic_files.write_json(folder / INFO, asdict(self))


def read_info(folder: Path) -> BundleInfo:
    """Read bundle.json. Raises UserError if it is missing, damaged, edited, or of another format version."""
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
    """Read bundle.json and the settings of a bundle, and verify the hashes of its files.

    Raises UserError if a file is missing or differs from its hash, or if the settings are not a valid model config.
    """
    info = read_info(folder)
    needed = [WEIGHTS, CONFIG] + ([layer_plan.FILE] if info.quantized else [])
    for name in needed:
        verify_file(folder, info, name)
    return info, read_model_config(folder / CONFIG, info.components)


def verify_file(folder: Path, info: BundleInfo, name: str) -> None:
    """Raise UserError if the file `name` of a bundle is missing, is not a regular file, or differs from its hash."""
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
    """Raise DamagedFile if a file is larger than its kind allows, because hashing a huge file would take too long."""
    if path.suffix == ".safetensors":
        read_weights_header(path)
    elif (size := require_regular(path).st_size) > (YAML_LIMIT if path.name == CONFIG else JSON_LIMIT):
        raise DamagedFile(path, f"has {size} bytes, more than such a file may have")


def read_hashes(path: str | Path) -> dict[str, str]:
    """Return the sha256 of "weights" and "config" from bundle.json. The files are not hashed again.

    `path` is a run folder with a bundle, or a bundle.
    """
    recorded = read_info(find_bundle(path)).sha256
    return {"weights": recorded.get(WEIGHTS, ""), "config": recorded.get(CONFIG, "")}


def load(folder: Path) -> tuple[ModelConfig, RunModels]:
    """Load the settings and the models of a bundle. The models are in evaluation mode.

    The networks are first built on the meta device and compared with the header of the weights, before memory is
    allocated. Raises UserError if a file is missing or changed, if the settings do not fit the weights, or if a weight
    is NaN or infinite.
    """
    info, config = read_verified(folder)
    return config, build_verified(folder, info, config)


def build_verified(folder: Path, info: BundleInfo, config: ModelConfig) -> RunModels:
    """Build the models of a bundle that `read_verified` has checked.

    Sets `config.classifier` to None if the bundle has no trained classifier.
    """
    if CLASSIFIER not in info.parts:
        config.classifier = None  # the classifier is not trained (yet); everything except guidance works without it
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
    """Raise UserError if the networks of `config` do not fit the weights. Allocates memory for neither."""
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
    """Raise UserError if the bundle is quantized, because quantized weights cannot be used for training."""
    if info.quantized:
        raise UserError(f"{what} is quantized ({info.quantized}): name the bundle from which it was made")


def find_bundle(path: str | Path) -> Path:
    """Return the bundle in a run folder, or `path` itself if it is a bundle. Raises UserError if there is no folder."""
    folder = Path(path)
    inner = folder / "bundle"
    if inner.is_dir():
        return inner
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run or bundle")
    return folder
