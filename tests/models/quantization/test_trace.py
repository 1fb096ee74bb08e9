"""Which layers of a network are quantized, over every registered network."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dvae.models.quantization import trace
from dvae.models.quantization.integer_layer import TimeBucket
from dvae.models.quantization.layer_plan import replace_in
from dvae.models.quantization.quantized_layers import StorageFormat, StoredLayer
from dvae.registry.classifiers.base import CLASSIFIERS
from dvae.registry.core import Shapes
from dvae.registry.encoders.base import ENCODERS
from dvae.registry.refiners.base import REFINERS, NetworkCondition

LEVELS = {"width": 32, "multipliers": [1, 2], "blocks": 1}
SMALL: dict[str, dict[str, Any]] = {
    "unet": LEVELS | {"attention_resolutions": [8]},
    "simple_unet": LEVELS,
    "flat_resnet": {"width": 32, "blocks": 2},
    "ncsnpp": LEVELS | {"attention_resolutions": [8], "dropout": 0.0},
    "dit": {"width": 64, "depth": 2, "heads": 2},
    "mlp": {"width": 64, "blocks": 2},
}
"""Small configs of the networks that would else be slow; any other has its default."""
PLAIN = Shapes(image_size=8)
ALL = Shapes(image_size=8, k=2, condition_channels=3, latent=(5,), condition_latent=True, labels=4)
KEPT = {
    "unet": {"time_embed.0", "time_embed.2", "input_blocks.0.0", "out.2"},
    "simple_unet": {"time_embed.0", "time_embed.2", "stem", "out.1"},
    "dit": {"time_embed.0", "time_embed.2", "in_proj", "out_proj"},
    "mlp": {"embed_time.0", "embed_time.2", "in_proj", "out_proj.1"},
    "ncsnpp": {"all_modules.0", "all_modules.1", "all_modules.2"},  # and the last, by its number
}
TIMES = torch.tensor([3.0, 900.0])


def inputs(shapes: Shapes) -> tuple[torch.Tensor, torch.Tensor, NetworkCondition]:
    draw = torch.Generator().manual_seed(1)
    given = NetworkCondition()
    if shapes is ALL:
        latent = torch.randn(2, 5, generator=draw)
        given = NetworkCondition(torch.randn(2, 3, 8, 8, generator=draw), latent, torch.tensor([0, 4]))
    return torch.randn(2, shapes.k * 3, 8, 8, generator=draw), TIMES, given


@pytest.mark.parametrize("shapes", [PLAIN, ALL], ids=["plain", "all conditions"])
@pytest.mark.parametrize("name", REFINERS.names())
def test_every_refiner_is_quantized_and_runs(name: str, shapes: Shapes) -> None:
    torch.manual_seed(0)
    refiner = REFINERS.build({"name": name, **SMALL.get(name, {})}, shapes).eval().requires_grad_(False)
    for parameter in refiner.parameters():
        if not parameter.any():
            parameter.normal_(std=0.05)
    called = trace.trace_network(refiner, refiner, shapes)
    assert KEPT.get(name, set()) <= called.sensitive <= set(called.names)
    assert len(called.sensitive) <= 4
    wanted = refiner(*inputs(shapes))
    rest = [layer for layer in called.names if layer not in called.sensitive]
    assert rest
    replace_in(refiner, rest, StorageFormat.int8, 0, TimeBucket(1), "a test")
    replace_in(refiner, sorted(called.sensitive), StorageFormat.bf16, 0, TimeBucket(1), "a test")
    found = refiner(*inputs(shapes))
    assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert refiner(*inputs(shapes)).isfinite().all()
    assert sum(isinstance(layer, StoredLayer) for layer in refiner.modules()) == len(called.names)


@pytest.mark.parametrize("name", [name for name in ENCODERS.names() if name not in ("none", "diffusers_kl")])
def test_every_encoder_is_quantized_and_runs(name: str) -> None:
    # diffusers_kl is the network of kl_gan, in the size of public weights
    torch.manual_seed(0)
    shapes = Shapes(image_size=32)
    encoder = ENCODERS.build({"name": name}, shapes).eval().requires_grad_(False)
    called = trace.trace_encoder(encoder, shapes)
    assert len(called.sensitive) == 2
    x = torch.randn(1, 3, 32, 32).clamp(-1, 1)
    wanted = encoder.decode(encoder.encode(x).mean)
    replace_in(encoder, called.names, StorageFormat.int8, 0, TimeBucket(1), "a test")
    found = encoder.decode(encoder.encode(x).mean)
    assert (found - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("name", CLASSIFIERS.names())
def test_every_classifier_is_quantized_and_keeps_its_gradient(name: str) -> None:
    torch.manual_seed(0)
    config = {"name": name, "width": 32, "multipliers": [1], "blocks": 1, "attention_resolutions": []}
    classifier = CLASSIFIERS.build(config, ALL).eval().requires_grad_(False)
    called = trace.trace_network(classifier, classifier, ALL)
    u, t, given = inputs(ALL)

    def gradient() -> torch.Tensor:
        state = u.clone().requires_grad_()
        return torch.autograd.grad(classifier(state, t, given)[:, 1].sum(), state)[0]

    wanted = gradient()
    replace_in(classifier, called.names, StorageFormat.int8, 0, TimeBucket(1), "a test")
    assert (gradient() - wanted).norm() < 0.1 * wanted.norm()
