"""Find the layers that a network calls, and those that are sensitive to quantization.

The layers are found by running the network, so the result does not depend on their names. These layers are sensitive
and are kept in bf16:

- the first layer whose input depends on the state;
- the last layer;
- the embedding of the time: in this family of networks, the first two layers whose input depends on the time only.

Weights that a network uses without calling their layer are not found. Examples are the attention of U-Nets, which
uses the weights directly, norms and embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from dvae.models.quantization.quantized_layers import quantizable
from dvae.registry.core import Shapes
from dvae.registry.encoders.base import Encoder
from dvae.registry.refiners.base import NetworkCondition

TIME_LAYERS = 2
"""Number of layers in the embedding of the time."""


@dataclass(frozen=True)
class CalledLayers:
    """Names of the quantizable layers of a network, in the order in which they are called."""

    names: list[str]
    sensitive: set[str]
    """Names of the layers to keep in bf16."""


@contextmanager
def watch_inputs(layers: Mapping[str, nn.Module], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Context in which see(name, x) is called with the first input x of every layer of `layers` that is called."""

    def hook_for(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda layer, inputs: see(name, inputs[0])

    hooks = [layer.register_forward_pre_hook(hook_for(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def record_inputs(module: nn.Module, call: Callable[[], object]) -> dict[str, torch.Tensor]:
    """Run `call()`, and return the first input of each quantizable layer of `module` that it calls.

    The names are in the order of the calls. If a layer is called several times, its first call counts.
    """
    seen: dict[str, torch.Tensor] = {}

    def record(name: str, x: torch.Tensor) -> None:
        seen.setdefault(name, x.clone())

    layers = {name: layer for name, layer in module.named_modules() if quantizable(layer)}
    with watch_inputs(layers, record), torch.no_grad():
        call()
    return seen


def trace_encoder(encoder: Encoder, shapes: Shapes) -> CalledLayers:
    """Find the layers of an encoder and its decoder.

    Sensitive are the first layer of the encoder and the last layer of the decoder, which are next to the image.
    """
    x = torch.linspace(-1, 1, shapes.channels * shapes.image_size**2).view(
        1, shapes.channels, shapes.image_size, shapes.image_size
    )
    down = list(record_inputs(encoder, lambda: encoder.encode(x)))
    up = list(record_inputs(encoder, lambda: encoder.decode(torch.ones(1, *encoder.latent_shape))))
    return CalledLayers(list(dict.fromkeys(down + up)), {*down[:1], *up[-1:]})


Network = Callable[[torch.Tensor, torch.Tensor, NetworkCondition], object]


def trace_network(module: nn.Module, network: Network, shapes: Shapes) -> CalledLayers:
    """Find the layers of a network that is called as network(u, t_feature, condition), like a refiner.

    The names are relative to `module`. The network runs four times: once, and then with another state, time or
    condition. The comparison shows on which of these the input of each layer depends.
    """
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=draw)

    side = (shapes.image_size, shapes.image_size)
    u, t = normal(shapes.k * shapes.channels, *side), torch.tensor([300.0])
    condition = NetworkCondition(
        image=normal(shapes.condition_channels, *side) if shapes.condition_channels else None,
        latent=normal(*shapes.latent) if shapes.condition_latent else None,
        label=torch.zeros(1, dtype=torch.long) if shapes.labels else None,
    )
    first = record_inputs(module, lambda: network(u, t, condition))
    other_u = record_inputs(module, lambda: network(u + 1.0, t, condition))
    other_t = record_inputs(module, lambda: network(u, t + 100.0, condition))
    told = replace(condition, latent=None if condition.latent is None else condition.latent + 1.0)
    if condition.label is not None:
        told = replace(told, label=condition.label + 1)
    other_condition = record_inputs(module, lambda: network(u, t, told))

    def differs(name: str, other: dict[str, torch.Tensor]) -> bool:
        return not torch.equal(first[name], other[name])

    names = list(first)
    sees_state = [name for name in names if differs(name, other_u)]
    sees_time = [
        name for name in names
        if differs(name, other_t) and not differs(name, other_u) and not differs(name, other_condition)
    ]  # fmt: skip
    return CalledLayers(names, {*sees_state[:1], *names[-1:], *sees_time[:TIME_LAYERS]})
