"""Formulations 1 and 2, prediction types, dropped conditions and labels, each against what theory says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dvae.diffusion.conditioning import Conditioning, NoiseSample
from dvae.diffusion.denoiser import Center, Denoiser, DenoiserConfig
from dvae.diffusion.kernels import Diffusion, Factor, Matching
from dvae.diffusion.objective import PredictionType
from dvae.errors import UserError
from dvae.registry.core import Shapes
from dvae.registry.processes.base import PROCESSES
from dvae.registry.refiners.base import REFINERS, NetworkCondition
from dvae.registry.schedules.base import SCHEDULES

IO = Shapes(image_size=8, latent=(5,), condition_channels=3, condition_latent=True)
UNET = {"name": "unet", "width": 32, "multipliers": [1], "blocks": 1, "attention_resolutions": []}
CLASSES = 4


def make(schedule: str = "cosine", process: str = "vp", **config: object) -> Denoiser:
    torch.manual_seed(0)
    settings = DenoiserConfig(**({"condition_latent": True} | config))
    diffusion = Diffusion(
        PROCESSES.build({"name": process}, IO),
        SCHEDULES.build({"name": schedule}, IO),
        matching=settings.matching,
        factor=settings.factor,
    )
    shapes = replace(
        IO, k=diffusion.k, outputs=len(diffusion.predicted_components), labels=CLASSES * settings.condition_label
    )
    refiner = REFINERS.build(UNET, shapes)
    for parameter in refiner.parameters():  # zero-initialized layers would hide differences
        torch.nn.init.normal_(parameter, std=0.1)
    return Denoiser(refiner, diffusion, settings, shapes).eval()


def batch(n: int = 4, k: int = 1) -> tuple[torch.Tensor, Conditioning, NoiseSample]:
    generator = torch.Generator().manual_seed(1)
    x, x_hat = (torch.randn(n, 3, 8, 8, generator=generator) for _ in range(2))
    eps, start = (torch.randn(n, 3 * k, 8, 8, generator=generator) for _ in range(2))
    z = torch.randn(n, 5, generator=generator)
    t = torch.tensor([0.01, 0.3, 0.7, 1.0][:n], dtype=torch.float64)
    return (
        x,
        Conditioning(x_hat, z, torch.arange(n) % CLASSES),
        NoiseSample(t, eps, torch.ones(n, dtype=torch.bool), aux_noise=start),
    )


def test_formulation_2_is_formulation_1_with_mapped_weights() -> None:
    """W1 (y + x_hat) + W2 x_hat = W1 y + (W1 + W2) x_hat, so both are one function class."""
    second, first = make(center=Center.input), make(center=Center.none)
    state = second.state_dict()
    stem = "refiner.input_blocks.0.0.weight"
    w1, w2 = second.state_dict()[stem].split([3, 3], dim=1)
    state[stem] = torch.cat([w1, w1 + w2], dim=1)
    first.load_state_dict(state)
    x, conditioning, noise_sample = batch()
    u = first.diffusion.perturb(x, noise_sample.t, noise_sample.eps)
    torch.testing.assert_close(
        second.network_output(u, noise_sample.t, conditioning),
        first.network_output(u, noise_sample.t, conditioning),
        atol=1e-5,
        rtol=1e-5,
    )
    torch.testing.assert_close(
        second(x, conditioning, noise_sample), first(x, conditioning, noise_sample), atol=1e-5, rtol=1e-5
    )
    assert not torch.allclose(
        make(center=Center.input)(x, conditioning, noise_sample), make()(x, conditioning, noise_sample), atol=1e-3
    )


class Perfect(torch.nn.Module):
    """A refiner that puts out what it should."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self.target = target

    def forward(self, u: torch.Tensor, t: torch.Tensor, condition: NetworkCondition) -> torch.Tensor:
        return self.target


KINDS_OF_PREDICTION = [
    *(("vp", {"prediction": prediction}) for prediction in PredictionType),
    *((process, {"mixed": mixed}) for process in ("vp", "psld", "cld") for mixed in (False, True)),
    *(("psld", {"matching": m, "factor": f}) for m in Matching for f in Factor),
    ("cld", {"matching": Matching.dsm}),
]


@pytest.mark.parametrize(("process", "config"), KINDS_OF_PREDICTION)
def test_a_perfect_refiner_has_no_loss_and_gives_back_the_image(process: str, config: dict) -> None:
    denoiser = make(schedule="linear", process=process, center=Center.residual, data_scale=3.0, **config)
    x, conditioning, noise_sample = batch(k=denoiser.diffusion.k)
    if denoiser.config.matching is not Matching.dsm:
        noise_sample = replace(noise_sample, aux_noise=None)
    u = denoiser.add_noise(x, conditioning, noise_sample)
    denoiser.refiner = Perfect(denoiser._target(x, u, conditioning, noise_sample))
    assert denoiser(x, conditioning, noise_sample).max() == 0.0
    eps, y0 = denoiser.predict(u, noise_sample.t, conditioning)
    explained = denoiser.diffusion.project_eps(u, noise_sample.t, noise_sample.eps)
    torch.testing.assert_close(eps, explained, atol=3e-3, rtol=1e-3)
    if denoiser.config.matching is not Matching.dsm:  # else only the expected eps, given u, tells of y_0
        torch.testing.assert_close(eps, noise_sample.eps, atol=3e-3, rtol=1e-3)
        inner = slice(0, 3)  # at t = 1 eps says next to nothing of y_0
        torch.testing.assert_close(denoiser.to_image(y0, conditioning)[inner], x[inner], atol=2e-3, rtol=1e-3)


def test_the_mixed_part_alone_is_right_for_standard_normal_data() -> None:
    denoiser = make("linear", "cld", mixed=True)
    denoiser.refiner = Perfect(torch.zeros(2, 3, 8, 8))
    u = torch.randn(2, 6, 8, 8)
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    _, conditioning, _ = batch(2)
    eps = denoiser.predict(u, t, conditioning)[0]
    torch.testing.assert_close(eps, denoiser.diffusion.eps_for_normal_data(u, t), atol=1e-4, rtol=1e-4)


def test_one_noise_component_needs_half_the_outputs() -> None:
    x, conditioning, noise_sample = batch(k=2)
    assert make("linear", "cld").network_output(noise_sample.eps, noise_sample.t, conditioning).shape == x.shape
    assert (
        make("linear", "psld").network_output(noise_sample.eps, noise_sample.t, conditioning).shape
        == noise_sample.eps.shape
    )


@pytest.mark.parametrize("center", list(Center))
def test_image_and_state_are_inverse(center: Center) -> None:
    denoiser = make(center=center, data_scale=2.5)
    x, conditioning, _ = batch()
    torch.testing.assert_close(
        denoiser.to_image(denoiser.to_state(x, conditioning), conditioning), x, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("center", list(Center))
def test_a_dropped_condition_takes_its_shift_along(center: Center) -> None:
    """With every condition dropped, x_hat and z are without influence on the loss, whatever the center."""
    denoiser = make(center=center)
    x, conditioning, noise_sample = batch()
    dropped = NoiseSample(noise_sample.t, noise_sample.eps, torch.zeros(4, dtype=torch.bool))
    other = Conditioning(torch.randn_like(conditioning.x_hat), torch.randn_like(conditioning.z))
    torch.testing.assert_close(denoiser(x, conditioning, dropped), denoiser(x, other, dropped))
    half = NoiseSample(noise_sample.t, noise_sample.eps, torch.tensor([True, False, True, False]))
    mixed = denoiser(x, conditioning, half)
    torch.testing.assert_close(mixed[1::2], denoiser(x, conditioning, dropped)[1::2])
    torch.testing.assert_close(mixed[::2], denoiser(x, conditioning, noise_sample)[::2])


def test_a_dropped_label_is_the_class_past_the_last() -> None:
    denoiser = make(condition_label=True)
    x, conditioning, noise_sample = batch()
    keep = torch.tensor([True, False, True, False])
    assert denoiser.build_condition(conditioning.drop_label(keep)).label.tolist() == [0, CLASSES, 2, CLASSES]
    assert denoiser.build_condition(conditioning.drop(keep)).label.tolist() == [0, CLASSES, 2, CLASSES]
    assert denoiser.build_condition(Conditioning(conditioning.x_hat, conditioning.z)).label.tolist() == [CLASSES] * 4
    assert make().build_condition(conditioning).label is None
    # the class alone is dropped: x_hat stays, and the class is without influence
    dropped = replace(noise_sample, keep_label=torch.zeros(4, dtype=torch.bool))
    other = Conditioning(conditioning.x_hat, conditioning.z, (conditioning.label + 1) % CLASSES)
    torch.testing.assert_close(denoiser(x, conditioning, dropped), denoiser(x, other, dropped))
    assert not torch.equal(denoiser(x, conditioning, noise_sample), denoiser(x, other, noise_sample))


def test_labels_are_dropped_with_the_conditions_and_alone() -> None:
    drawn = make(condition_label=True, condition_dropout=0.3, label_dropout=0.5).sample_noise(0, torch.arange(4000))
    assert not drawn.keep_label[~drawn.keep].any()
    assert drawn.keep_label[drawn.keep].float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert make().sample_noise(0, torch.arange(4)).keep_label is None


def test_the_loss_is_weighted_per_sample() -> None:
    denoiser = make("linear", "psld")
    x, conditioning, noise_sample = batch(k=2)
    noise_sample = replace(noise_sample, aux_noise=None)
    W = torch.randn(4, 2, 2, dtype=torch.float64)
    error = (
        denoiser.network_output(denoiser.add_noise(x, conditioning, noise_sample), noise_sample.t, conditioning)
        - noise_sample.eps
    )
    parts = error.unflatten(1, (2, 3))
    expected = torch.einsum("bichw,bij,bjchw->b", parts, W.float(), parts) / error[0].numel()
    torch.testing.assert_close(
        denoiser(x, conditioning, replace(noise_sample, weight=W)), expected, atol=1e-4, rtol=1e-4
    )


def test_draws_are_keyed_by_sample_number() -> None:
    denoiser = make(condition_dropout=0.5)
    whole = denoiser.sample_noise(7, torch.arange(100, 164))
    part = denoiser.sample_noise(7, torch.arange(120, 130))
    assert torch.equal(whole.t[20:30], part.t)
    assert torch.equal(whole.eps[20:30], part.eps)
    assert torch.equal(whole.keep[20:30], part.keep)
    assert not torch.equal(whole.eps, denoiser.sample_noise(8, torch.arange(100, 164)).eps)
    assert 0.2 < whole.keep.float().mean() < 0.8


def test_discrete_schedules_train_on_their_table() -> None:
    t = make("ddpm_linear").sample_noise(0, torch.arange(5000)).t
    assert torch.equal(torch.round(t * 1000) / 1000, t)
    assert t.min() >= 1 / 1000
    assert t.max() == 1.0


def test_denoising_score_matching_draws_the_momentum() -> None:
    assert make("linear", "psld").sample_noise(0, torch.arange(3)).aux_noise is None
    assert make("linear", "psld", matching=Matching.dsm).sample_noise(0, torch.arange(3)).aux_noise.shape == (
        3,
        6,
        8,
        8,
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"center": Center.input, "condition_image": False}, "condition_image=true"),
        ({"condition_dropout": 1.5}, "use 0 to 1"),
        ({"label_dropout": -0.5}, "use 0 to 1"),
        ({"data_scale": 0.0}, "null to measure"),
        ({"process": "psld", "schedule": "linear", "prediction": PredictionType.v}, "prediction=v.*k = 1 only"),
        ({"process": "cld", "schedule": "linear", "prediction": PredictionType.x0}, "prediction=x0.*k = 1 only"),
        ({"schedule": "flow"}, "prediction=eps.*use v or x0"),
        ({"prediction": PredictionType.v, "mixed": True}, "mixed=true is defined for eps"),
    ],
)
def test_what_cannot_work_is_refused(config: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make(**config)


def test_labels_need_classes() -> None:
    denoiser = make()
    with pytest.raises(UserError, match=r"classes=\[...\]"):
        Denoiser(denoiser.refiner, denoiser.diffusion, DenoiserConfig(condition_label=True), IO)
