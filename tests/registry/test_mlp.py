"""The MLP refiner: what it resolves, what it is told, and what it refuses. The contract is in test_contract.py."""

from __future__ import annotations

import pytest
import torch

from dvae.errors import UserError
from dvae.registry.core import Shapes
from dvae.registry.refiners.base import REFINERS, NetworkCondition
from dvae.registry.refiners.mlp import time_features


def build(shapes: Shapes, **fields: int) -> torch.nn.Module:
    torch.manual_seed(0)
    module = REFINERS.build({"name": "mlp", "width": 32, "blocks": 2, **fields}, shapes)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return module.eval()


def test_neighboring_small_times_are_far_apart() -> None:
    """Doubling t moves the features as much at 1e-4 as it does at 0.1; those of t alone hardly move there."""
    t = torch.tensor([1e-4, 2e-4, 0.1, 0.2]) * 1000
    features = time_features(t, 64)
    assert features.shape == (4, 128)
    moved = (features[1] - features[0]).norm() / (features[3] - features[2]).norm()
    assert moved > 0.5
    of_t = features[:, :64]
    assert (of_t[1] - of_t[0]).norm() < 0.1 * (of_t[3] - of_t[2]).norm()


def test_features_at_the_ends_are_finite() -> None:
    assert time_features(torch.tensor([0.0, 1000.0]), 16).isfinite().all()


@pytest.mark.parametrize(("k", "outputs", "channels"), [(1, 0, 2), (2, 0, 4), (2, 1, 2)])
def test_it_predicts_what_is_asked_for(k: int, outputs: int, channels: int) -> None:
    module = build(Shapes(image_size=1, channels=2, k=k, outputs=outputs))
    assert module(torch.randn(3, 2 * k, 1, 1), torch.rand(3), NetworkCondition()).shape == (3, channels, 1, 1)


def test_every_condition_matters_and_must_be_given() -> None:
    shapes = Shapes(image_size=2, channels=1, latent=(3,), condition_channels=1, condition_latent=True, labels=4)
    module, u, t = build(shapes), torch.randn(2, 1, 2, 2), torch.tensor([1.0, 500.0])
    given = {"image": torch.randn(2, 1, 2, 2), "latent": torch.randn(2, 3), "label": torch.tensor([0, 4])}
    others = {"image": torch.randn(2, 1, 2, 2), "latent": torch.randn(2, 3), "label": torch.tensor([1, 2])}
    output = module(u, t, NetworkCondition(**given))
    for name in given:
        assert not torch.allclose(module(u, t, NetworkCondition(**(given | {name: others[name]}))), output), name
        with pytest.raises(ValueError, match=f"condition.{name}, which was not given"):
            module(u, t, NetworkCondition(**(given | {name: None})))


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"width": 30}, "multiple of 4"), ({"blocks": 0}, "one block"), ({"frequencies": -1}, "0 freq")],
)
def test_sizes_that_cannot_be(fields: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(Shapes(image_size=1, channels=2), **fields)


def test_no_latent_to_be_guided_by() -> None:
    with pytest.raises(UserError, match="the encoder gives none"):
        build(Shapes(image_size=1, channels=2, latent=(0,), condition_latent=True))
