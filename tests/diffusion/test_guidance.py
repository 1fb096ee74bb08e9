"""Guidance, thresholding and prediction types, each against the model that it must reduce to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from closed_forms import IO as PIXEL
from closed_forms import Mixture, diffusion, integrable, normal

from dvae.diffusion.conditioning import Conditioning
from dvae.diffusion.denoiser import Center, Denoiser, DenoiserConfig
from dvae.diffusion.guidance import Guidance, GuidedDenoiser, apply_threshold
from dvae.diffusion.objective import PredictionType
from dvae.diffusion.sampler_model import Threshold
from dvae.errors import UserError
from dvae.registry.core import Shapes
from dvae.registry.refiners.base import REFINERS, NetworkCondition
from dvae.registry.samplers.base import SAMPLERS

CLASSES = 3
UNET = {"name": "unet", "width": 32, "multipliers": [1], "blocks": 1, "attention_resolutions": []}


def make(process: str = "vp", **config: object) -> Denoiser:
    torch.manual_seed(0)
    settings = DenoiserConfig(
        **({"condition_latent": True, "condition_label": True, "condition_dropout": 0.1, "label_dropout": 0.1} | config)
    )
    d = diffusion(process, "linear")
    shapes = Shapes(
        image_size=8, k=d.k, outputs=len(d.predicted_components), latent=(5,), condition_channels=3,
        condition_latent=True, labels=CLASSES,
    )  # fmt: skip
    refiner = REFINERS.build(UNET, shapes)
    for parameter in refiner.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return Denoiser(refiner, d, settings, shapes).eval()


def conditioning(n: int = 2) -> Conditioning:
    return Conditioning(normal(1, n, 3, 8, 8).float(), normal(2, n, 5).float(), torch.arange(n) % CLASSES)


def states(denoiser: Denoiser, condition: Conditioning, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The same noisy images as states with `condition`, and as states without."""
    x, eps = normal(3, 2, 3, 8, 8).float(), normal(4, 2, 3 * denoiser.diffusion.k, 8, 8).float()
    nothing = condition.drop(torch.zeros(2, dtype=torch.bool))

    def add_noise(c: Conditioning) -> torch.Tensor:
        return denoiser.diffusion.perturb(denoiser.diffusion.initial_state(denoiser.to_state(x, c)), t, eps)

    return add_noise(condition), add_noise(nothing)


CENTERS = [(process, center) for process in ("vp", "psld") for center in Center]


@pytest.mark.parametrize(("process", "center"), CENTERS)
@torch.no_grad()
def test_weight_1_is_the_conditional_model_and_0_the_unconditional(process: str, center: Center) -> None:
    denoiser = make(process, center=center, data_scale=2.0)
    full, t = conditioning(), torch.full((2,), 0.5, dtype=torch.float64)
    u, bare = states(denoiser, full, 0.5)
    nothing = full.drop(torch.zeros(2, dtype=torch.bool))
    conditional = GuidedDenoiser(denoiser, full)
    assert torch.equal(conditional(u, 0.5).eps, denoiser.predict(u, t, full)[0])
    unconditional = GuidedDenoiser(denoiser, full, Guidance(condition=0.0))
    eps, x0 = denoiser.predict(bare, t, nothing)  # without a condition the same noisy image has no shift
    torch.testing.assert_close(unconditional(u, 0.5).eps, eps, atol=1e-5, rtol=1e-4)
    image = denoiser.to_image(unconditional(u, 0.5).x0, full)
    torch.testing.assert_close(image, denoiser.to_image(x0, nothing), atol=1e-4, rtol=1e-4)
    assert (conditional.nfe_per_call, unconditional.nfe_per_call) == (1, 1)
    between = GuidedDenoiser(denoiser, full, Guidance(condition=3.0))
    expected = eps + 3.0 * (conditional(u, 0.5).eps - eps)
    torch.testing.assert_close(between(u, 0.5).eps, expected, atol=1e-4, rtol=1e-4)
    assert between.nfe_per_call == 2


@torch.no_grad()
def test_label_weight_1_is_the_conditional_model_and_0_that_without_a_class() -> None:
    denoiser, full, t = make(), conditioning(), torch.full((2,), 0.5, dtype=torch.float64)
    u, _ = states(denoiser, full, 0.5)
    without = full.drop_label(torch.zeros(2, dtype=torch.bool))
    eps, unlabeled = denoiser.predict(u, t, full)[0], denoiser.predict(u, t, without)[0]
    assert torch.equal(GuidedDenoiser(denoiser, full, Guidance(label=1.0))(u, 0.5).eps, eps)
    assert torch.equal(GuidedDenoiser(denoiser, full, Guidance(label=0.0))(u, 0.5).eps, unlabeled)
    model = GuidedDenoiser(denoiser, full, Guidance(condition=2.0, label=4.0))
    nothing = denoiser.predict(u, t, full.drop(torch.zeros(2, dtype=torch.bool)))[0]
    expected = nothing + 2.0 * (unlabeled + 4.0 * (eps - unlabeled) - nothing)
    torch.testing.assert_close(model(u, 0.5).eps, expected, atol=1e-4, rtol=1e-4)
    assert model.nfe_per_call == 3


class LinearClassifier(torch.nn.Module):
    """Logits (a . u) for class 1 of 2, so that its gradient is known; keeps what it was told of t."""

    def __init__(self, a: torch.Tensor) -> None:
        super().__init__()
        self.a = a
        self.features: list[torch.Tensor] = []

    def forward(self, u: torch.Tensor, t_feature: torch.Tensor, condition: NetworkCondition) -> torch.Tensor:
        self.features.append(t_feature)
        logit = (u * self.a).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(logit), logit], 1)


class Exact(Denoiser):
    """A denoiser whose output is the exact eps, x0 or v of a mixture."""

    def __init__(self, mixture: Mixture, prediction: PredictionType = PredictionType.eps, labels: int = 0) -> None:
        config = DenoiserConfig(prediction=prediction, condition_image=False, condition_label=labels > 0)
        shapes = replace(PIXEL, k=mixture.diffusion.k, labels=labels)
        super().__init__(torch.nn.Identity(), mixture.diffusion, config, shapes)
        self.mixture = mixture

    def network_output(self, u: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        d, k = self.diffusion, self.diffusion.k
        if k > 1 or self.config.prediction is PredictionType.eps:
            return self._predicted(self.mixture(u, t).eps)
        # E[x0 | u] from the score (Tweedie), by the posterior of each component where alpha may be 0
        alpha, sigma = (value.view(-1, 1, 1, 1) for value in (d.alpha(t), d.sigma(t)))
        m, v = self.mixture.means[0], self.mixture.variances[0]
        x0 = m + alpha * v / (alpha**2 * v + sigma**2) * (u - alpha * m)
        if self.config.prediction is PredictionType.x0:
            return x0
        return alpha * (u - alpha * x0) / sigma - sigma * x0


def plain(n: int, label: torch.Tensor | None = None) -> Conditioning:
    return Conditioning(torch.zeros(n, 1, 1, 1, dtype=torch.float64), torch.zeros(n, 0), label)


@pytest.mark.parametrize("explained", [True, False])
@pytest.mark.parametrize("process", ["vp", "psld", "cld"])
@pytest.mark.parametrize("t", [0.1, 0.6])
@torch.no_grad()
def test_classifier_guidance_adds_its_gradient_to_the_score_at_the_physical_time(
    process: str, t: float, explained: bool
) -> None:
    """score + w grad log p(y | u_t), whatever the process; of a gradient that no image explains, what one does."""
    mixture = Mixture(diffusion(process, "linear"))
    k = mixture.diffusion.k
    a = normal(0, 1, k, 1, 1)
    if explained:
        Phi, L = mixture.diffusion.marginal(t)
        direction = torch.linalg.solve(L @ L.mT, Phi[:, :, :1]).view(1, k, 1, 1)
        a = a[:, :1] * direction / direction.norm()
    classifier = LinearClassifier(a)
    u, labels = normal(1, 5, k, 1, 1), torch.ones(5, dtype=torch.int64)
    model = GuidedDenoiser(Exact(mixture, labels=2), plain(5, labels), Guidance(classifier=3.0), classifier)
    logit = (u * a).flatten(1).sum(1)
    gradient = a * torch.sigmoid(-logit).view(-1, 1, 1, 1)  # of log sigmoid(a . u)
    expected = mixture.score(u, t) + 3.0 * gradient
    if not explained:
        d = mixture.diffusion
        expected = d.score_from_eps(d.project_eps(u, t, d.eps_from_score(expected, t)), t)
    torch.testing.assert_close(model(u, t).score, expected, rtol=1e-6, atol=1e-6)
    feature = mixture.diffusion.schedule.time_feature(torch.tensor(t, dtype=torch.float64)).float()
    assert torch.equal(classifier.features[0], feature.expand(5))
    assert model.nfe_per_call == 1


@torch.no_grad()
def test_a_whole_sampling_tells_the_classifier_the_time_of_the_refiner() -> None:
    mixture = Mixture(diffusion("vp", "linear"))
    classifier = LinearClassifier(normal(0, 1, 1, 1, 1))
    model = GuidedDenoiser(
        Exact(mixture, labels=2), plain(2, torch.tensor([0, 1])), Guidance(classifier=1.0), classifier
    )
    sampler = SAMPLERS.build({"name": "ddim", "steps": 5, "threshold": "none"}, PIXEL)
    sampler.sample(model, normal(1, 2, 1, 1, 1), lambda i: normal(2 + i, 2, 1, 1, 1))
    told = [feature[0].item() for feature in classifier.features]
    assert told == pytest.approx([1000.0, 800.0, 600.0, 400.0, 200.0])


def test_classifier_guidance_draws_from_the_class() -> None:
    """Two components as two classes with the exact classifier: weight 1 gives the component of the class."""
    d = diffusion("vp", "linear")
    both = Mixture(d, means=(-0.6, 0.5), variances=(0.02, 0.04), weights=(0.5, 0.5))
    parts = [Mixture(d, means=(m,), variances=(v,)) for m, v in zip(both.means, both.variances, strict=True)]

    class Posterior(torch.nn.Module):
        def forward(self, u: torch.Tensor, t_feature: torch.Tensor, condition: NetworkCondition) -> torch.Tensor:
            t = t_feature.double() / 1000.0
            return torch.stack([part.log_density(u, t).flatten() for part in parts], 1)

    sampler = SAMPLERS.build({"name": "ddim", "steps": 200, "threshold": "none"}, PIXEL)
    n = 4000
    for label, part in enumerate(parts):
        model = GuidedDenoiser(
            Exact(both, labels=2), plain(n, torch.full((n,), label)), Guidance(classifier=1.0), Posterior()
        )
        x = sampler.sample(model, normal(7, n, 1, 1, 1), lambda i: normal(i, n, 1, 1, 1)).u
        assert x.mean().item() == pytest.approx(part.mean, abs=0.02)
        assert x.std().item() == pytest.approx(part.variance**0.5, rel=0.06)


# -- prediction types --


@pytest.mark.parametrize(("name", "process", "schedule"), integrable(("vp",), ("linear", "cosine", "flow")))
def test_all_prediction_types_give_the_same_samples(name: str, process: str, schedule: str) -> None:
    """From the same exact denoiser, to 1e-5; eps is not defined on the flow's clock."""
    mixture = Mixture(diffusion(process, schedule))
    sampler = SAMPLERS.build({"name": name, "steps": 12, "threshold": "none"}, PIXEL)
    kinds = [kind for kind in PredictionType if schedule != "flow" or kind is not PredictionType.eps]
    ends = []
    for kind in kinds:
        model = GuidedDenoiser(Exact(mixture, kind), plain(16))
        ends.append(sampler.sample(model, normal(1, 16, 1, 1, 1), lambda i: normal(2 + i, 16, 1, 1, 1)).u)
    assert ends[0].isfinite().all()
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-5)


# -- thresholds --


@pytest.mark.parametrize("threshold", [Threshold.clamp, Threshold.dynamic])
@pytest.mark.parametrize(("process", "center"), CENTERS)
@torch.no_grad()
def test_thresholds_keep_the_image_in_range_and_eps_consistent(
    process: str, center: Center, threshold: Threshold
) -> None:
    denoiser, full = make(process, center=center, data_scale=4.0), conditioning()
    u, _ = states(denoiser, full, 0.6)
    model = GuidedDenoiser(denoiser, full)
    free, kept = model(u, 0.6), model(u, 0.6, threshold=threshold)
    image = denoiser.to_image(kept.x0, full)
    assert denoiser.to_image(free.x0, full).abs().max() > 1.0
    assert image.abs().max() <= 1.0 + 1e-5
    # u is what it was: what x0 lost, eps gained
    d = denoiser.diffusion
    expected = d.perturb(d.initial_state(kept.x0 - free.x0), 0.6, kept.eps - free.eps)
    torch.testing.assert_close(expected, torch.zeros_like(u), atol=1e-4, rtol=0)


def test_dynamic_thresholding() -> None:
    images = torch.linspace(-3, 3, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)[torch.randperm(2)]
    out = apply_threshold(images, Threshold.dynamic)
    for before, after in zip(images, out, strict=True):
        limit = torch.quantile(before.abs().flatten(), 0.995)
        torch.testing.assert_close(after, before.clamp(-limit, limit) / limit)
    inside = 0.9 * torch.rand(2, 3, 8, 8)  # within the range nothing is scaled
    assert torch.equal(apply_threshold(inside, Threshold.dynamic), inside)


# -- refusals --


@pytest.mark.parametrize(
    ("guidance", "config", "said"),
    [
        ({"condition": 2.0}, {"condition_dropout": 0.0}, "guidance=2.0.*condition_dropout above 0"),
        ({"label": 2.0}, {"label_dropout": 0.0}, "label_guidance=2.0.*label_dropout above 0"),
        ({"label": 2.0}, {"condition_label": False}, "condition_label=true"),
        ({"classifier": 1.0}, {}, "trained classifier"),
    ],
)
def test_guidance_needs_its_training(guidance: dict, config: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        GuidedDenoiser(make(**config), conditioning(), Guidance(**guidance))


def test_classifier_guidance_needs_a_class_and_an_end() -> None:
    classifier = LinearClassifier(torch.ones(1))
    with pytest.raises(UserError, match="needs a class"):
        GuidedDenoiser(make(), replace(conditioning(), label=None), Guidance(classifier=1.0), classifier)
    flow = Exact(Mixture(diffusion("vp", "flow")), PredictionType.v, labels=2)
    with pytest.raises(UserError, match="not defined at t = 1"):
        GuidedDenoiser(flow, plain(1, torch.tensor([0])), Guidance(classifier=1.0), classifier)


# -- what adaptive samplers and likelihoods need --


@pytest.mark.parametrize("process", ["vp", "psld"])
@torch.no_grad()
def test_some_of_the_images_have_their_own_conditions(process: str) -> None:
    denoiser, full = make(process), conditioning(3)
    u = normal(5, 3, 3 * denoiser.diffusion.k, 8, 8).float()
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    bound, rows = GuidedDenoiser(denoiser, full, Guidance(condition=2.0, label=3.0)), torch.tensor([2, 0])
    some = bound[rows](u[rows], t[rows])
    torch.testing.assert_close(some.score, bound(u, t).score[rows], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("process", ["vp", "psld"])
def test_the_score_is_differentiable_in_the_state(process: str) -> None:
    bound = GuidedDenoiser(make(process), conditioning())
    u, way = (normal(seed, 2, 3 * bound.diffusion.k, 8, 8).float() for seed in (6, 7))

    def along(step: float) -> torch.Tensor:
        return (bound(u + step * way, 0.5).score * way).flatten(1).sum(1)

    u.requires_grad_()
    (gradient,) = torch.autograd.grad(along(0.0).sum(), u)
    with torch.no_grad():
        numeric = (along(1e-2) - along(-1e-2)) / 2e-2
    torch.testing.assert_close((gradient * way).flatten(1).sum(1), numeric, rtol=1e-2, atol=0)
