"""Noisy classifiers on two normal classes, where p(class | u_t), its accuracy and its gradient have closed forms."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dvae.diffusion.kernels import Diffusion
from dvae.errors import UserError
from dvae.layers.attention import AttentionBackend
from dvae.layers.pooling import AttentionPool
from dvae.registry.classifiers.base import CLASSIFIERS, Classifier
from dvae.registry.core import Shapes
from dvae.registry.processes.base import PROCESSES
from dvae.registry.refiners.base import NetworkCondition
from dvae.registry.schedules.base import SCHEDULES

IO = Shapes(image_size=8, channels=1, labels=2)
SMALL = {"name": "half_unet", "width": 32, "multipliers": [1], "blocks": 1, "attention_resolutions": [], "patch": 2}
MEAN, SPREAD, PIXELS = 0.15, 0.5, 64
"""Class 1 is bright, N(MEAN, SPREAD^2) in every pixel, class 0 dark, N(-MEAN, SPREAD^2)."""
DIFFUSION = Diffusion(PROCESSES.build({"name": "vp"}, IO), SCHEDULES.build({"name": "cosine"}, IO))


STEPS = 150


def noisy(n: int, t: torch.Tensor, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """States u_t (n, 1, 8, 8) and classes (n,)."""
    labels = torch.randint(2, (n,), generator=draw)
    shape = (n, 1, 8, 8)
    x = (2.0 * labels.view(-1, 1, 1, 1) - 1) * MEAN + SPREAD * torch.randn(shape, generator=draw)
    return DIFFUSION.perturb(x, t, torch.randn(shape, generator=draw)), labels


def separation(t: torch.Tensor) -> torch.Tensor:
    """Half the log-odds of bright per unit of the summed pixels of u_t: alpha m / (alpha^2 spread^2 + sigma^2)."""
    alpha, sigma = DIFFUSION.alpha(t), DIFFUSION.sigma(t)
    return (alpha * MEAN / (alpha**2 * SPREAD**2 + sigma**2)).float()


def best_accuracy(t: float) -> float:
    """Accuracy of the exact p(class | u_t): Phi(sqrt(pixels) alpha m / standard deviation of a pixel)."""
    time = torch.tensor([t], dtype=torch.float64)
    alpha, sigma = float(DIFFUSION.alpha(time)), float(DIFFUSION.sigma(time))
    z = math.sqrt(PIXELS) * alpha * MEAN / math.sqrt(alpha**2 * SPREAD**2 + sigma**2)
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def feature(t: torch.Tensor) -> torch.Tensor:
    return DIFFUSION.schedule.time_feature(t).float()


@pytest.fixture(scope="module")
def trained() -> Classifier:
    torch.manual_seed(0)
    classifier = CLASSIFIERS.build(SMALL, IO)
    draw = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(classifier.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    for _ in range(STEPS):
        t = 1 - torch.rand(64, generator=draw, dtype=torch.float64)
        u, labels = noisy(64, t, draw)
        loss = F.cross_entropy(classifier(u, feature(t), NetworkCondition()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return classifier.eval().requires_grad_(False)


@pytest.mark.parametrize(("t", "low", "high"), [(0.02, 0.97, 1.0), (0.5, 0.8, 0.9), (0.995, 0.45, 0.55)])
def test_accuracy_nears_the_best_at_every_time(trained: Classifier, t: float, low: float, high: float):
    times = torch.full((2000,), t, dtype=torch.float64)
    u, labels = noisy(2000, times, torch.Generator().manual_seed(2))
    accuracy = float((trained(u, feature(times), NetworkCondition()).argmax(1) == labels).float().mean())
    assert low <= accuracy <= high
    assert accuracy == pytest.approx(best_accuracy(t), abs=0.03)


def test_its_gradient_is_near_that_of_the_exact_posterior(trained: Classifier):
    """Summed over pixels, d log p(bright | u_t) / du = (1 - p) 2 separation pixels."""
    times = torch.full((1000,), 0.5, dtype=torch.float64)
    u, _ = noisy(1000, times, torch.Generator().manual_seed(3))
    u.requires_grad_()
    log_p = F.log_softmax(trained(u, feature(times), NetworkCondition()), 1)[:, 1]
    (gradient,) = torch.autograd.grad(log_p.sum(), u)
    found = gradient.flatten(1).sum(1)
    p = torch.sigmoid(2 * separation(times) * u.detach().flatten(1).sum(1))
    exact = (1 - p) * 2 * separation(times) * PIXELS
    assert float(torch.corrcoef(torch.stack([log_p.detach().exp(), p]))[0, 1]) > 0.9
    assert float((found > 0).float().mean()) > 0.98
    assert float(found.mean() / exact.mean()) == pytest.approx(1.0, abs=0.35)


def test_the_class_is_not_looked_at_and_x_hat_is(trained: Classifier):
    shapes = replace(IO, condition_channels=1)
    torch.manual_seed(0)
    classifier = CLASSIFIERS.build(SMALL, shapes)
    u, t = torch.randn(2, 1, 8, 8), torch.tensor([10.0, 900.0])
    first = classifier(u, t, NetworkCondition(image=torch.zeros(2, 1, 8, 8), label=torch.tensor([0, 1])))
    assert torch.equal(first, classifier(u, t, NetworkCondition(image=torch.zeros(2, 1, 8, 8))))
    assert not torch.equal(first, classifier(u, t, NetworkCondition(image=torch.ones(2, 1, 8, 8))))
    with pytest.raises(ValueError, match=r"condition\.image"):
        classifier(u, t, NetworkCondition())


def test_pooling_by_hand():
    """One head, identity projections, no positions: softmax over <mean, token> / sqrt(C) of mean and pixels."""
    pool = AttentionPool(2, 2, 1, 2, AttentionBackend.sdpa)
    with torch.no_grad():
        pool.positional_embedding.zero_()
        pool.qkv_proj.weight.copy_(torch.eye(2).repeat(3, 1)[:, :, None])
        pool.c_proj.weight.copy_(torch.eye(2)[:, :, None])
        for projection in (pool.qkv_proj, pool.c_proj):
            projection.bias.zero_()
    x = torch.tensor([[[[1.0, 2.0], [3.0, -2.0]], [[0.0, 1.0], [1.0, 2.0]]]])
    tokens = torch.tensor([[1.0, 1.0], [1.0, 0.0], [2.0, 1.0], [3.0, 1.0], [-2.0, 2.0]])
    weights = torch.softmax(tokens @ tokens[0] / math.sqrt(2), 0)
    torch.testing.assert_close(pool(x)[0], weights @ tokens)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"width": 33}, "classifier.width 33 is not a multiple of 32"),
        ({"multipliers": [1, 1, 1, 1]}, "images of 8 px do not halve 3 times after classifier.patch 2"),
        ({"attention_resolutions": [16]}, "classifier.attention_resolutions [16] do not occur"),
        ({"heads": 3}, "classifier.heads 3 does not divide 32 channels"),
        ({"groups": 3}, "classifier.groups 3 does not divide classifier.width 32"),
    ],
)
def test_fields_that_do_not_fit(fields: dict[str, object], says: str):
    with pytest.raises(UserError, match=re.escape(says)):
        CLASSIFIERS.build(SMALL | fields, IO)
