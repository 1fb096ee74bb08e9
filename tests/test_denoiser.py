"""Formulations 1 and 2, prediction types, condition dropout and guidance, each against what theory says."""

from __future__ import annotations

import itertools

import pytest
import torch

from dvae.denoiser import Centre, Denoiser, DenoiserConfig, Draws, Given, PredictionType
from dvae.diffusion import Diffusion
from dvae.errors import UserError
from dvae.registry import PROCESSES, REFINERS, SCHEDULES, Shapes
from dvae.registry.refiners import Condition

IO = Shapes(image_size=8, latent=(5,), condition_channels=3, condition_latent=True)
UNET = {"name": "unet", "width": 32, "multipliers": [1], "blocks": 1, "attention_resolutions": []}


def make(schedule: str = "cosine", **config: object) -> Denoiser:
    torch.manual_seed(0)
    refiner = REFINERS.build(UNET, IO)
    for parameter in refiner.parameters():  # zero-initialised layers would hide differences
        torch.nn.init.normal_(parameter, std=0.1)
    diffusion = Diffusion(PROCESSES.build({"name": "vp"}, IO), SCHEDULES.build({"name": schedule}, IO))
    settings = {"condition_latent": True} | config
    return Denoiser(refiner, diffusion, DenoiserConfig(**settings), IO).eval()


def batch(n: int = 4) -> tuple[torch.Tensor, Given, Draws]:
    generator = torch.Generator().manual_seed(1)
    x, x_hat, eps = (torch.randn(n, 3, 8, 8, generator=generator) for _ in range(3))
    z = torch.randn(n, 5, generator=generator)
    return x, Given(x_hat, z), Draws(torch.tensor([0.01, 0.3, 0.7, 1.0][:n]), eps, torch.ones(n, dtype=torch.bool))


def test_formulation_2_is_formulation_1_with_mapped_weights() -> None:
    """W1 (y + x_hat) + W2 x_hat = W1 y + (W1 + W2) x_hat, so both are one function class."""
    second, first = make(centre=Centre.input), make(centre=Centre.none)
    state = second.state_dict()
    stem = "refiner.input_blocks.0.0.weight"
    w1, w2 = second.state_dict()[stem].split([3, 3], dim=1)
    state[stem] = torch.cat([w1, w1 + w2], dim=1)
    first.load_state_dict(state)
    x, given, draws = batch()
    u = first.diffusion.perturb(x, draws.t, draws.eps)
    torch.testing.assert_close(second.output(u, draws.t, given), first.output(u, draws.t, given), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(second(x, given, draws), first(x, given, draws), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(make(centre=Centre.input)(x, given, draws), make()(x, given, draws), atol=1e-3)


@pytest.mark.parametrize("prediction", list(PredictionType))
def test_a_perfect_refiner_has_no_loss_and_gives_back_the_image(prediction: PredictionType) -> None:
    denoiser = make(prediction=prediction, centre=Centre.residual, data_scale=3.0)
    x, given, draws = batch()
    state = denoiser.to_state(x, given)
    target = denoiser._target(state, draws)

    class Perfect(torch.nn.Module):
        def forward(self, u: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
            return target

    denoiser.refiner = Perfect()
    assert denoiser(x, given, draws).max() == 0.0
    u = denoiser.diffusion.perturb(state, draws.t, draws.eps)
    eps, y0 = denoiser.predict(u, draws.t, given)
    inner = slice(0, 3)  # at t = 1 eps says next to nothing of y_0
    torch.testing.assert_close(denoiser.to_image(y0, given)[inner], x[inner], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(eps, draws.eps, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("centre", list(Centre))
def test_image_and_state_are_inverse(centre: Centre) -> None:
    denoiser = make(centre=centre, data_scale=2.5)
    x, given, _ = batch()
    torch.testing.assert_close(denoiser.to_image(denoiser.to_state(x, given), given), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("centre", list(Centre))
def test_a_dropped_condition_takes_its_shift_along(centre: Centre) -> None:
    """With every condition dropped, x_hat and z are without influence on the loss, whatever the centre."""
    denoiser = make(centre=centre)
    x, given, draws = batch()
    dropped = Draws(draws.t, draws.eps, torch.zeros(4, dtype=torch.bool))
    other = Given(torch.randn_like(given.x_hat), torch.randn_like(given.z))
    torch.testing.assert_close(denoiser(x, given, dropped), denoiser(x, other, dropped))
    half = Draws(draws.t, draws.eps, torch.tensor([True, False, True, False]))
    mixed = denoiser(x, given, half)
    torch.testing.assert_close(mixed[1::2], denoiser(x, given, dropped)[1::2])
    torch.testing.assert_close(mixed[::2], denoiser(x, given, draws)[::2])


@pytest.mark.parametrize(("centre", "weight"), list(itertools.product(Centre, [0.0, -1.0])))
def test_guidance_0_is_the_conditional_model_and_minus_1_the_unconditional(centre: Centre, weight: float) -> None:
    denoiser = make(centre=centre, condition_dropout=0.1, data_scale=2.0)
    x, given, draws = batch(2)
    u = denoiser.diffusion.perturb(denoiser.to_state(x, given), 0.5, draws.eps)
    with torch.no_grad():
        guided = denoiser.bind(given, weight)(u, 0.5).eps
        if weight == 0.0:
            expected = denoiser.predict(u, torch.full((2,), 0.5), given)[0]
        else:  # the unconditional model sees the same noisy image without a shift
            nothing = given.drop(torch.zeros(2))
            same = denoiser.diffusion.perturb(denoiser.to_state(x, nothing), 0.5, draws.eps)
            expected = denoiser.predict(same, torch.full((2,), 0.5), nothing)[0]
    torch.testing.assert_close(guided, expected, atol=1e-5, rtol=1e-4)


def test_clipping_keeps_the_image_in_range_and_eps_consistent() -> None:
    denoiser = make(centre=Centre.residual, data_scale=4.0)
    x, given, draws = batch(2)
    u = denoiser.diffusion.perturb(denoiser.to_state(x, given), 0.6, draws.eps)
    with torch.no_grad():
        prediction = denoiser.bind(given)(u, 0.6, clip=True)
    image = denoiser.to_image(prediction.x0, given)
    assert image.abs().max() <= 1.0 + 1e-6
    back = denoiser.diffusion.perturb(prediction.x0, 0.6, prediction.eps)
    torch.testing.assert_close(back, u, atol=1e-5, rtol=1e-5)


def test_draws_are_keyed_by_sample_number() -> None:
    denoiser = make(condition_dropout=0.5)
    whole = denoiser.draw(7, torch.arange(100, 164))
    part = denoiser.draw(7, torch.arange(120, 130))
    assert torch.equal(whole.t[20:30], part.t)
    assert torch.equal(whole.eps[20:30], part.eps)
    assert torch.equal(whole.keep[20:30], part.keep)
    assert not torch.equal(whole.eps, denoiser.draw(8, torch.arange(100, 164)).eps)
    assert 0.2 < whole.keep.float().mean() < 0.8


def test_discrete_schedules_train_on_their_table() -> None:
    t = make("ddpm_linear").draw(0, torch.arange(5000)).t
    assert torch.equal(torch.round(t * 1000) / 1000, t)
    assert t.min() >= 1 / 1000
    assert t.max() == 1.0


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"centre": Centre.input, "condition_image": False}, "condition_image=true"),
        ({"condition_dropout": 1.5}, "use 0 to 1"),
        ({"data_scale": 0.0}, "null to measure"),
    ],
)
def test_what_cannot_work_is_refused(config: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make(**config)


def test_guidance_needs_training_with_dropout() -> None:
    _, given, _ = batch()
    with pytest.raises(UserError, match="condition_dropout above 0"):
        make().bind(given, 1.0)
