"""What every encoder, refiner and classifier must do, over all registered names, so that a new one is covered.

And what every component of any kind must be before it is registered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from torch import nn

from dvae.registry.classifiers.base import CLASSIFIERS
from dvae.registry.core import ComponentConfig, Registry, Shapes
from dvae.registry.discovery import registries
from dvae.registry.encoders.base import ENCODERS
from dvae.registry.refiners.base import REFINERS, NetworkCondition
from dvae.registry.schedules.base import SCHEDULES, Schedule

SHAPES = {
    "encoder": Shapes(image_size=32),
    "refiner": Shapes(image_size=16, k=2, latent=(8,), condition_channels=3, condition_latent=True, labels=5),
    "classifier": Shapes(image_size=16, k=2, latent=(8,), condition_channels=3, condition_latent=True, labels=6),
}
COMPONENTS = [
    pytest.param(registry, name, id=f"{registry.kind}-{name}")
    for registry in (ENCODERS, REFINERS, CLASSIFIERS)
    for name in registry.names()
]
every_component = pytest.mark.parametrize(("registry", "name"), COMPONENTS)
BATCH = 2


def build(registry: Registry, name: str, seed: int = 0) -> nn.Module:
    """The component with its default Config; parameters that start at zero are moved off it, so that all take part."""
    torch.manual_seed(seed)
    module = registry.build({"name": name}, SHAPES[registry.kind])
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return module.eval()


def run(module: nn.Module, shapes: Shapes) -> dict[str, torch.Tensor]:
    """The component's outputs for fixed inputs, by name."""
    draw = torch.Generator().manual_seed(1)
    side = (shapes.image_size, shapes.image_size)
    if shapes is SHAPES["encoder"]:
        x = torch.rand(BATCH, shapes.channels, *side, generator=draw) * 2 - 1
        noise = torch.randn(BATCH, *module.latent_shape, generator=draw)
        terms = {key: value for key, value in module(x, noise).items() if value.ndim == 1}  # maps are an adversary's
        return terms | {"x_hat": module.decode(module.encode(x).sample(noise))}
    condition = NetworkCondition(
        image=torch.randn(BATCH, shapes.condition_channels, *side, generator=draw),
        latent=torch.randn(BATCH, *shapes.latent, generator=draw),
        label=torch.tensor([0, shapes.labels]),
    )
    u = torch.randn(BATCH, shapes.k * shapes.channels, *side, generator=draw)
    name = "logits" if shapes is SHAPES["classifier"] else "output"
    return {name: module(u, torch.tensor([3.0, 900.0]), condition)}


@every_component
def test_config_survives_yaml(registry, name):
    config = registry.config({"name": name})
    assert registry.config(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(config)))) == config


@every_component
def test_shapes_and_gradients(registry, name):
    shapes = SHAPES[registry.kind]
    module = build(registry, name)
    outputs = run(module, shapes)
    images = {"x_hat": (BATCH, shapes.channels, shapes.image_size, shapes.image_size)}
    images["output"] = (BATCH, shapes.k * shapes.channels, shapes.image_size, shapes.image_size)
    images["logits"] = (BATCH, shapes.labels)
    for key, value in outputs.items():
        assert value.shape == images.get(key, (BATCH,)), key
        assert value.dtype == torch.float32, key
    if list(module.parameters()):  # encoder=none has nothing to train
        sum(value.square().mean() for value in outputs.values()).backward()
    dead = [key for key, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@every_component
def test_bf16_autocast_is_finite_and_near_fp32(registry, name):
    shapes = SHAPES[registry.kind]
    module = build(registry, name)
    with torch.no_grad():
        wanted = run(module, shapes)
        with torch.autocast("cpu", torch.bfloat16):
            got = run(module, shapes)
    for key, value in got.items():
        assert value.dtype == torch.float32, key
        assert value.isfinite().all(), key
        scale = wanted[key].abs().max()
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=0.05 * float(scale), msg=key)


@every_component
def test_state_dict_restores_the_function(registry, name):
    shapes = SHAPES[registry.kind]
    first, second = build(registry, name), build(registry, name, seed=1)
    with torch.no_grad():
        wanted, other = run(first, shapes), run(second, shapes)
        same = all(torch.equal(wanted[key], other[key]) for key in wanted)
        assert same == (not first.state_dict())
        second.load_state_dict(first.state_dict(), strict=True)
        restored = run(second, shapes)
    for key in wanted:
        assert torch.equal(wanted[key], restored[key]), key


@pytest.mark.parametrize(
    ("registry", "name"),
    [pytest.param(one, name, id=f"{kind}-{name}") for kind, one in registries().items() for name in one.names()],
)
def test_every_component_may_be_registered(registry, name):
    cls = registry.get(name)
    assert registry.base in cls.__mro__
    assert registry.base is not cls
    assert registry.check_component(name, cls).name == name


def component(base: type, config: Any, **methods: Any) -> type:
    return type("Mine", (base,), {"Config": config, "__module__": "mine", "__qualname__": "Mine"} | methods)


METHODS = {name: lambda self, t: t for name in ("__init__", "integral", "rate", "inverse")}


@dataclass(kw_only=True, slots=True)
class Good(ComponentConfig):
    rate: float = 1.0


@dataclass(kw_only=True, slots=True)
class WithoutDefault(ComponentConfig):
    rate: float


@dataclass(kw_only=True, slots=True)
class OfAnotherType(ComponentConfig):
    rate: int = "fast"  # type: ignore[assignment]


@dataclass(slots=True)
class Positional(ComponentConfig):
    rate: float = 1.0


@pytest.mark.parametrize(
    ("name", "cls", "error", "message"),
    [
        ("mine", component(Schedule, WithoutDefault, **METHODS), TypeError, "Config.rate has no default: give it one"),
        ("mine", component(Schedule, OfAnotherType, **METHODS), TypeError, "cannot be built from its defaults"),
        ("mine", component(Schedule, Positional, **METHODS), TypeError, "needs a nested @dataclass"),
        ("mine", component(Schedule, None, **METHODS), TypeError, "needs a nested @dataclass"),
        ("mine", component(nn.Module, Good), TypeError, "derives from dvae.registry.schedules.base.Schedule"),
        ("mine", component(Schedule, Good, rate=1, __init__=1), TypeError, "must implement integral, inverse"),
        ("mine", 3, TypeError, "must be a class"),
        (3, component(Schedule, Good, **METHODS), TypeError, "a name is text"),
        ("Mine", component(Schedule, Good, **METHODS), ValueError, "lower-case letters, digits and underscores"),
        ("linear", component(Schedule, Good, **METHODS), ValueError, "'linear' of mine is registered already, by dvae"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(name, cls, error, message):
    names, configs = SCHEDULES.names(), dict(ConfigStore.instance().repo["schedule"])
    with pytest.raises(error, match=message):
        SCHEDULES.register(name)(cls)
    assert SCHEDULES.names() == names
    assert ConfigStore.instance().repo["schedule"] == configs
