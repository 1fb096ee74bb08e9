"""Load trained parts of another run's bundle for a run: the encoder, or the models of a teacher."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from dvae.config.model_config import model_config
from dvae.config.schema import ModelConfig, RunConfig
from dvae.errors import UserError
from dvae.models.bundle import WEIGHTS, build_verified, find_bundle, read_verified, refuse_quantized
from dvae.models.components import RunModels
from dvae.utils.weights import StateDict, load_weights, part_of, refuse_nonfinite


def load_encoder_weights(source: str, config: RunConfig) -> StateDict:
    """Return the trained weights of the encoder in the run folder or bundle `source`.

    Raises UserError if there is no trained encoder, or if its settings differ from the encoder of `config`.
    """
    what = f"encoder_weights={source}"
    folder = find_bundle(source)
    info, theirs = read_verified(folder)
    refuse_quantized(what, info)
    if "encoder" not in info.parts:
        raise UserError(f"{what} has no trained encoder: name a run whose encoder stage is finished")
    require_same_networks(what, theirs, config, ("encoder",))
    weights = part_of(load_weights(folder / WEIGHTS), "encoder")
    refuse_nonfinite(weights, str(folder / WEIGHTS))
    return weights


def load_teacher(source: str, config: RunConfig) -> RunModels:
    """Load the trained models of the run folder or bundle `source`, for a run with the same networks.

    Raises UserError if a part is missing, or if the settings of the networks differ from `config`.
    """
    what, folder = f"teacher={source}", find_bundle(source)
    info, theirs = read_verified(folder)
    refuse_quantized(what, info)
    require_same_networks(what, theirs, config, ("encoder", "prior", "process", "schedule", "refiner", "denoiser"))
    return build_verified(folder, info, theirs)


def require_same_networks(what: str, theirs: ModelConfig, config: RunConfig, kinds: tuple[str, ...]) -> None:
    """Raise UserError, with the first field that differs, if components of `kinds` differ between two configs."""
    there, here = _network_settings(theirs, kinds), _network_settings(model_config(config), kinds)
    for name in [*here, *(name for name in there if name not in here)]:
        if there.get(name) != here.get(name):
            raise UserError(f"{what} has {name}={there.get(name)}, this run {here.get(name)}: it is another network")


def _network_settings(config: ModelConfig, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Return the settings from which the components of `kinds` are built: dotted field -> value."""
    found: dict[str, Any] = {"image_size": config.image_size, "channels": config.channels}
    for kind in kinds:
        fields: Any = OmegaConf.to_container(OmegaConf.structured(getattr(config, kind)), enum_to_str=True)
        found |= {f"{kind}.{name}": value for name, value in fields.items()}
    return found
