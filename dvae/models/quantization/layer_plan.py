"""What is done to which layer of a bundle, and the file beside its weights that says so: quantization.json."""

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
"""The part that is left as it is: fitted figures, not a network that is run at every step."""


class QuantizationMethod(Enum):
    """How a bundle is quantized."""

    int8_weights = "int8_weights"
    """Weights as int8, made whole where they are used; everything is computed as before."""
    int8 = "int8"
    """Weights and, in the refiner, activations as int8, multiplied by oneDNN's int8 kernels; on CPUs."""
    int4_weights = "int4_weights"
    """Weights as int4, two a byte."""


@forbid_extra
@dataclass(kw_only=True, slots=True)
class QuantizationPlan:
    """The content of quantization.json."""

    method: str
    """A QuantizationMethod."""
    group: int
    """Inputs that share a scale, for int4."""
    buckets: int
    """Parts of the time with scales of activations of their own, for int8."""
    layers: dict[str, dict[str, list[str]]]
    """Part of the bundle -> StorageFormat -> names of layers in that part."""
    measured: dict[str, Any] = field(default_factory=dict)
    """Bytes, speed and KID beside the original, and whether it is offered for speed (quantization/compare.py)."""


def make_plan(models: RunModels, method: QuantizationMethod, group: int, buckets: int) -> QuantizationPlan:
    """The plan for the networks of `models`, in evaluation mode: every layer that they call is stored in less."""
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
        if most is None:  # one pass of encoder or classifier is little beside the refiner's
            most = StorageFormat.integer if part == "denoiser" else StorageFormat.int8
        layers[part] = {
            StorageFormat.bf16.name: [name for name in called.names if name in called.sensitive],
            most.name: [name for name in called.names if name not in called.sensitive],
        }
    return QuantizationPlan(method=method.name, group=group, buckets=buckets, layers=layers)


def networks(models: RunModels) -> dict[str, nn.Module]:
    """The parts that are quantized."""
    return {name: part for name, part in models.trained_parts().items() if name != PRIOR}


def replace_layers(models: RunModels, plan: QuantizationPlan, what: str) -> None:
    """Put the plan's layers in the place of those of `models`, with their weights.

    Raises UserError naming the first layer that the networks do not have, after `what`.
    """
    time_bucket = integer_layer.TimeBucket(max(plan.buckets, 1))
    parts = networks(models)
    if parts.keys() != plan.layers.keys():
        there, here = ", ".join(sorted(plan.layers)), ", ".join(sorted(parts))
        raise UserError(f"{what} is quantized in {there}, the config has {here}: quantize the run again")
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
    """Put stored layers in the place of those called `names`. Raises UserError where one is no layer that can be."""
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
    """Let the layers that need it prepare their weights, once these are loaded."""
    for module in models.denoiser.modules():
        if isinstance(module, integer_layer.IntegerLayer):
            module.pack_weights()


def parts_to_save(models: RunModels) -> dict[str, dict[str, torch.Tensor]]:
    """State dicts for a bundle, of models whose layers are replaced: parameters that are left go in bf16.

    Buffers stay as they are: random frequencies would lose their phase in bf16.
    """
    parts = {}
    for name, part in models.trained_parts().items():
        parameters = dict(part.named_parameters()) if name != PRIOR else {}
        parts[name] = {
            key: value.to(torch.bfloat16) if key in parameters else value for key, value in part.state_dict().items()
        }
    return parts


def memory_bytes(models: RunModels) -> int:
    """Bytes that weights and fitted figures take."""
    held = 0
    for part in models.trained_parts().values():
        held += sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))
        held += sum(layer.packed_bytes for layer in part.modules() if isinstance(layer, integer_layer.IntegerLayer))
    return held


def requires_cpu(models: RunModels) -> bool:
    """Whether the networks compute with kernels that are for CPUs."""
    return any(isinstance(layer, integer_layer.IntegerLayer) for layer in models.denoiser.modules())


def write_plan(folder: Path, plan: QuantizationPlan) -> None:
    """Write quantization.json into a bundle, complete or not at all."""
    atomic_files.write_text(folder / FILE, json.dumps(asdict(plan), separators=(",", ":")) + "\n")


def read_plan(folder: Path, method: str) -> QuantizationPlan:
    """The plan of a bundle whose bundle.json says `method`.

    Raises UserError if the file cannot be read, or does not fit.
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
