"""The plan of a quantized bundle: the storage format of each layer.

The plan is stored in the bundle as quantization.json.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dvae.errors import UserError, fold, suggest
from dvae.models.components import RunModels
from dvae.models.quantization import integer_layer, trace
from dvae.models.quantization.quantized_layers import StorageFormat, StoredLayer, quantizable
from dvae.utils import atomic_files
from dvae.utils.read import DamagedFile, forbid_extra, read_json

FILE = "quantization.json"
AGAIN = "quantize the run again"
MAX_GROUP, MAX_BUCKETS = 2**20, 1000
PRIOR = "prior"
"""The part that is not quantized, because it holds fitted values and is not a network that runs at every step."""


class QuantizationMethod(Enum):
    """Method of quantization of a bundle."""

    int8_weights = "int8_weights"
    """int8 weights, which are dequantized when they are used. The computation is in floating point, as before."""
    int8 = "int8"
    """int8 weights and, in the refiner, int8 activations, multiplied by oneDNN's int8 kernels. For CPUs only."""
    int4_weights = "int4_weights"
    """int4 weights, two per byte, which are dequantized when they are used."""


@forbid_extra
@dataclass(kw_only=True, slots=True)
class QuantizationPlan:
    """Content of quantization.json."""

    method: str
    """Name of a QuantizationMethod."""
    group: int
    """Number of inputs that share a scale, for int4."""
    buckets: int
    """Number of buckets of time, each with its own scales of activations, for int8."""
    layers: dict[str, dict[str, list[str]]]
    """Part of the bundle -> name of a StorageFormat -> names of the layers stored in it."""
    measured: dict[str, Any] = field(default_factory=dict)
    """Results of the comparison with the original (dvae/evaluation/quantization/compare.py).

    These are bytes, speed, KID, and whether the bundle is recommended for its speed.
    """


def make_plan(models: RunModels, method: QuantizationMethod, group: int, buckets: int) -> QuantizationPlan:
    """Make the plan for the networks of `models`, which must be in evaluation mode.

    Every quantizable layer that a network calls is stored in fewer bits. Sensitive layers are stored as bf16.
    """
    layers = {}
    for part, module in networks(models).items():
        if part == "encoder":
            called = trace.trace_encoder(models.encoder, models.shapes)
        elif part == "denoiser":
            called = trace.trace_network(module, models.denoiser.refiner, models.denoiser.refiner.shapes)
        else:
            called = trace.trace_network(module, module, models.denoiser.shapes)
        most = {
            QuantizationMethod.int8_weights: StorageFormat.int8,
            QuantizationMethod.int4_weights: StorageFormat.int4,
        }.get(method)
        if most is None:  # int8: only the refiner computes in integers, because one pass of the others costs little
            most = StorageFormat.integer if part == "denoiser" else StorageFormat.int8
        layers[part] = {
            StorageFormat.bf16.name: [name for name in called.names if name in called.sensitive],
            most.name: [name for name in called.names if name not in called.sensitive],
        }
    return QuantizationPlan(method=method.name, group=group, buckets=buckets, layers=layers)


def networks(models: RunModels) -> dict[str, nn.Module]:
    """Return the parts that are quantized: all trained parts except the prior."""
    return {name: part for name, part in models.trained_parts().items() if name != PRIOR}


def replace_layers(models: RunModels, plan: QuantizationPlan, what: str) -> None:
    """Replace layers of `models` with the quantized layers of the plan, and quantize their weights.

    Raises UserError, with the name of the layer, if the networks lack a layer of the plan. The message starts with
    `what`.
    """
    time_bucket = integer_layer.TimeBucket(max(plan.buckets, 1))
    parts = networks(models)
    if parts.keys() != plan.layers.keys():
        there, here = ", ".join(sorted(plan.layers)), ", ".join(sorted(parts))
        raise UserError(f"{what}: its quantized parts are {there}, the config has {here}: quantize the run again")
    for part, module in parts.items():
        for store, names in plan.layers[part].items():
            replace_in(module, names, StorageFormat[store], plan.group, time_bucket, f"{what} ({part})")
    if plan.method == QuantizationMethod.int8.name:
        models.denoiser.refiner.register_forward_pre_hook(time_bucket.observe)


def replace_in(
    module: nn.Module,
    names: list[str],
    store: StorageFormat,
    group: int,
    time_bucket: integer_layer.TimeBucket,
    what: str,
) -> None:
    """Replace the layers `names` with stored layers. Raises UserError if one does not exist or cannot be quantized."""
    own = dict(module.named_modules())
    for name in names:
        if name not in own or not quantizable(own[name]):
            raise UserError(f"{what}: {FILE} names {name!r}, which is no layer of the config: quantize the run again")
        module.set_submodule(name, _stored(own[name], store, group, time_bucket))


def _stored(layer: Any, store: StorageFormat, group: int, time_bucket: integer_layer.TimeBucket) -> StoredLayer:
    return (
        integer_layer.IntegerLayer(layer, time_bucket)
        if store is StorageFormat.integer
        else StoredLayer(layer, store, group)
    )


def prepare_layers(models: RunModels) -> None:
    """Prepare the int8 layers for inference. Call this after the weights are loaded."""
    for module in models.denoiser.modules():
        if isinstance(module, integer_layer.IntegerLayer):
            module.pack_weights()


def parts_to_save(models: RunModels) -> dict[str, dict[str, torch.Tensor]]:
    """Return the state dicts for a bundle, from models with replaced layers.

    The parameters that remain are converted to bf16, except in the prior. Buffers keep their dtype, because random
    frequencies would lose their phase in bf16.
    """
    parts = {}
    for name, part in models.trained_parts().items():
        parameters = dict(part.named_parameters()) if name != PRIOR else {}
        parts[name] = {
            key: value.to(torch.bfloat16) if key in parameters else value for key, value in part.state_dict().items()
        }
    return parts


def memory_bytes(models: RunModels) -> int:
    """Return the bytes of memory that weights and fitted values need."""
    held = 0
    for part in models.trained_parts().values():
        held += sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))
        held += sum(layer.packed_bytes for layer in part.modules() if isinstance(layer, integer_layer.IntegerLayer))
    return held


def requires_cpu(models: RunModels) -> bool:
    """Return whether the networks use kernels that exist for CPUs only."""
    return any(isinstance(layer, integer_layer.IntegerLayer) for layer in models.denoiser.modules())


def write_plan(folder: Path, plan: QuantizationPlan) -> None:
    """Write quantization.json into a bundle, atomically."""
    atomic_files.write_text(folder / FILE, json.dumps(asdict(plan), separators=(",", ":")) + "\n")


def read_plan(folder: Path, method: str) -> QuantizationPlan:
    """Read the plan of a bundle whose bundle.json names `method`.

    Raises UserError if the file cannot be read, has invalid values or another method, or if this machine lacks the
    kernels that it needs.
    """
    path = folder / FILE
    try:
        plan = read_json(path, QuantizationPlan)
    except (OSError, DamagedFile) as error:
        raise UserError(f"{fold(error)}: not a readable plan: {AGAIN}") from None
    stores = {store for by_store in plan.layers.values() for store in by_store}
    if plan.method not in QuantizationMethod.__members__:
        raise UserError(
            f"{path}: unknown method {plan.method[:80]!r}: {suggest(plan.method[:80], QuantizationMethod.__members__)}"
        )
    if plan.method != method:
        raise UserError(f"{path} says method {plan.method}, bundle.json {method[:80]}: {AGAIN}")
    if foreign := sorted(stores - StorageFormat.__members__.keys()):
        raise UserError(
            f"{path}: unknown store {foreign[0][:80]!r}: {suggest(foreign[0][:80], StorageFormat.__members__)}"
        )
    odd_group = StorageFormat.int4.name in stores and (plan.group < 2 or plan.group % 2)
    if odd_group or not 0 <= plan.group <= MAX_GROUP or not 0 <= plan.buckets <= MAX_BUCKETS:
        raise UserError(f"{path}: group {plan.group} or buckets {plan.buckets} are out of bounds: {AGAIN}")
    if StorageFormat.integer.name in stores:
        integer_layer.check_machine()
    return plan
