from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dvae.layers.adversarial import (
    GanLoss,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    weight_gradient,
)

LOGITS = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0])


def test_hinge_known_answers() -> None:
    real = discriminator_loss(GanLoss.hinge, LOGITS, torch.full((5,), -3.0))  # fakes beyond the margin cost nothing
    torch.testing.assert_close(real, torch.tensor([1.5, 0.75, 0.5, 0.25, 0.0]))
    fake = discriminator_loss(GanLoss.hinge, torch.full((5,), 3.0), LOGITS)
    torch.testing.assert_close(fake, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.5]))
    assert torch.equal(generator_loss(GanLoss.hinge, LOGITS), -LOGITS)


def test_non_saturating_known_answers() -> None:
    zero = torch.zeros(1)
    torch.testing.assert_close(discriminator_loss(GanLoss.non_saturating, zero, zero), torch.tensor([math.log(2)]))
    probability = torch.sigmoid(LOGITS)
    torch.testing.assert_close(generator_loss(GanLoss.non_saturating, LOGITS), -probability.log())
    got = discriminator_loss(GanLoss.non_saturating, LOGITS, LOGITS)
    torch.testing.assert_close(got, -0.5 * (probability.log() + (1 - probability).log()))


@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 1)])
def test_weight_gradient_is_autograds(kernel: int, padding: int) -> None:
    layer = nn.Conv2d(4, 3, kernel, padding=padding)
    inputs = torch.randn(2, 4, 6, 6)
    outputs = layer(inputs)
    gradient = torch.randn_like(outputs)
    (wanted,) = torch.autograd.grad(outputs, layer.weight, gradient)
    torch.testing.assert_close(weight_gradient(layer, inputs, gradient), wanted, rtol=1e-4, atol=1e-5)


def test_adaptive_weight_by_hand() -> None:
    """A linear decoder of one pixel: the weight's gradient is gradient times input, so norms are products."""
    layer, inputs = nn.Conv2d(2, 1, 1), torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)  # norm 5
    error, adversarial = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -0.5)
    weight = adaptive_weight(layer, inputs, error, adversarial)
    assert float(weight) == pytest.approx(10.0 / (2.5 + 1e-4))
    assert float(adaptive_weight(layer, inputs, error, 0 * adversarial)) == 1e4  # bounded


def test_verdict_does_not_depend_on_the_rest_of_the_batch() -> None:
    discriminator = PatchDiscriminator(3, 16, 2)
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(discriminator(x)[:1], discriminator(x[:1]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_patch_is_as_documented(layers: int, patch: int) -> None:
    """Pixels whose change reaches the logit in the middle; norms, which mix all pixels, are taken out."""
    discriminator = PatchDiscriminator(1, 8, layers)
    convolutions = nn.Sequential(*[layer for layer in discriminator.layers if isinstance(layer, nn.Conv2d)])
    for layer in convolutions:
        nn.init.ones_(layer.weight)
    x = torch.zeros(1, 1, 160, 160, requires_grad=True)
    logits = convolutions(x)
    (gradient,) = torch.autograd.grad(logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2], x)
    assert int((gradient[0, 0] > 0).any(0).sum()) == patch
