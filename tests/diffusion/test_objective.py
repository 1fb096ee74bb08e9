"""Loss weights against the formulas of their papers, and the drawing of times."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from closed_forms import diffusion, normal

from dvae.diffusion.conditioning import Conditioning, NoiseSample
from dvae.diffusion.denoiser import Denoiser, DenoiserConfig
from dvae.diffusion.objective import LossConfig, Objective, PredictionType, TimeSampling, Weighting
from dvae.errors import UserError
from dvae.registry.core import Shapes
from dvae.registry.refiners.base import NetworkCondition

T = torch.tensor([0.003, 0.1, 0.5, 0.93], dtype=torch.float64)
IO = Shapes(image_size=4, channels=2)


def weight(prediction: str, process: str = "vp", schedule: str = "cosine", **config) -> torch.Tensor:
    objective = Objective(LossConfig(**config), diffusion(process, schedule), PredictionType(prediction))
    return objective.weight(T)


SNR = 1.0 / torch.expm1(diffusion("vp", "cosine").schedule.integral(T))


@pytest.mark.parametrize(
    ("weighting", "prediction", "formula"),
    [
        ("simple", "eps", torch.ones_like(SNR)),
        ("simple", "v", torch.ones_like(SNR)),
        ("truncated_snr", "x0", SNR.clamp(min=1.0)),  # Salimans & Ho 2022, section 4
        ("truncated_snr", "v", SNR.clamp(min=1.0) / (SNR + 1)),
        ("min_snr", "x0", SNR.clamp(max=5.0)),  # Hang et al. 2023, section 3.4, for the three kinds of prediction
        ("min_snr", "eps", SNR.clamp(max=5.0) / SNR),
        ("min_snr", "v", SNR.clamp(max=5.0) / (SNR + 1)),
        ("edm", "v", torch.ones_like(SNR)),
        ("flow", "x0", (1 + SNR.sqrt()) ** 2),
    ],
)
def test_weights_of_the_papers(weighting: str, prediction: str, formula: torch.Tensor) -> None:
    got = weight(prediction, weighting=Weighting(weighting))
    torch.testing.assert_close(got.flatten(), formula, rtol=1e-12, atol=0)


@pytest.mark.parametrize("prediction", list(PredictionType))
def test_likelihood_weighs_the_error_of_the_score(prediction: PredictionType) -> None:
    """beta/2 |score error|^2, from an error of x0, written for each prediction type."""
    d = diffusion("vp", "cosine")
    beta, alpha, sigma = d.schedule.rate(T), d.alpha(T), d.sigma(T)
    on_x0 = 0.5 * beta * (alpha / sigma**2) ** 2
    x0_error = {"x0": 1.0, "eps": (sigma / alpha) ** 2, "v": sigma**2}[prediction.value]
    got = weight(prediction.value, weighting=Weighting.likelihood)
    torch.testing.assert_close(got.flatten(), on_x0 * x0_error, rtol=1e-10, atol=0)


@pytest.mark.parametrize("process", ["psld", "cld"])
def test_likelihood_for_phase_space(process: str) -> None:
    """Half the squared norm of G^T (score error), G G^T = 2 beta D; for cld from the one predicted component."""
    d = diffusion(process, "constant")
    W = weight("eps", process, "constant", weighting=Weighting.likelihood)
    error = normal(0, len(T), 2, 1, 1)
    score = d.score_from_eps(error, T).flatten(1)
    expected = d.schedule.rate(T) * torch.einsum("bi,ij,bj->b", score, d.D, score)
    shown = error.flatten(1)[:, list(d.predicted_components)]
    torch.testing.assert_close(torch.einsum("bi,bij,bj->b", shown, W, shown), expected, rtol=1e-9, atol=0)


class Fixed(torch.nn.Module):
    """A refiner that puts out the same whatever it sees."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, u: torch.Tensor, t: torch.Tensor, condition: NetworkCondition) -> torch.Tensor:
        return self.output


def denoiser(schedule: str, output: torch.Tensor, weighting: str, data_scale: float = 1.0) -> Denoiser:
    config = DenoiserConfig(
        prediction=PredictionType.v, data_scale=data_scale, loss=LossConfig(weighting=Weighting(weighting))
    )
    return Denoiser(Fixed(output), diffusion("vp", schedule), config, IO)


def sample(seed: int = 0) -> tuple[torch.Tensor, Conditioning, torch.Tensor, torch.Tensor]:
    x, eps, output = (normal(seed + i, 4, 2, 4, 4).float() for i in range(3))
    return x, Conditioning(torch.zeros_like(x), torch.zeros(4, 0)), eps, output


def test_edm_is_v_on_its_clock() -> None:
    """Karras et al. 2022, table 1 and equation 8: the denoiser D(y; sigma) and its weighted loss, sigma_data = 0.5."""
    x, conditioning, eps, F = sample()
    T = torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    sigma_data, scale = 0.5, 2.0
    made = denoiser("edm", -F, "edm", scale)  # our v is minus their F
    sigma = made.diffusion.sigma(T) / made.diffusion.alpha(T) * sigma_data
    s = sigma.float().view(-1, 1, 1, 1)
    noisy = x + s * eps
    c_skip = sigma_data**2 / (s**2 + sigma_data**2)
    c_out = s * sigma_data / (s**2 + sigma_data**2).sqrt()
    D = c_skip * noisy + c_out * F
    loss = ((s**2 + sigma_data**2) / (s * sigma_data) ** 2 * (D - x) ** 2).flatten(1).mean(1)
    noise_sample = NoiseSample(T, eps, torch.ones(4, dtype=torch.bool), weight=made.objective.weight(T))
    u = made.add_noise(x, conditioning, noise_sample)
    torch.testing.assert_close(u, noisy / (s**2 + sigma_data**2).sqrt(), rtol=1e-5, atol=1e-5)  # c_in
    torch.testing.assert_close(
        made.to_image(made.predict(u, T, conditioning)[1], conditioning), D, rtol=1e-4, atol=1e-4
    )
    # ours is the loss of x / sigma_data, which theirs is too: lambda carries 1 / sigma_data^2
    torch.testing.assert_close(made(x, conditioning, noise_sample), loss, rtol=1e-4, atol=1e-5)


def test_flow_matching_is_v_on_its_clock() -> None:
    """Lipman et al. 2023, equation 23, on x_t = (1 - t) x0 + t eps: the error of the velocity eps - x0."""
    x, conditioning, eps, output = sample(5)
    made = denoiser("flow", output, "flow")
    t = T.float().view(-1, 1, 1, 1)
    length = (t**2 + (1 - t) ** 2).sqrt()
    u = ((1 - t) * x + t * eps) / length
    velocity = (output + (2 * t - 1) * u) / length
    noise_sample = NoiseSample(T, eps, torch.ones(4, dtype=torch.bool), weight=made.objective.weight(T))
    torch.testing.assert_close(made.add_noise(x, conditioning, noise_sample), u, rtol=1e-5, atol=1e-5)
    expected = (velocity - (eps - x)).square().flatten(1).mean(1)
    torch.testing.assert_close(made(x, conditioning, noise_sample), expected, rtol=1e-4, atol=1e-5)


# -- times --

UNIFORM = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000


@pytest.mark.parametrize("schedule", ["cosine", "linear", "ddpm_linear"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_importance_draws_leave_the_loss_unbiased(schedule: str, prediction: str) -> None:
    """Their mean of any error is that of uniform draws, and for the weight itself they have no variance."""
    config = LossConfig(weighting=Weighting.likelihood, times=TimeSampling.importance)
    objective = Objective(config, diffusion("vp", schedule), PredictionType(prediction))
    t, W = objective.sample_times(UNIFORM)
    assert (t > 0).all()
    assert (t <= 1).all()
    w = W.flatten()
    assert (w.std() / w.mean()).item() < 0.02  # the weight is constant up to the cells of the table
    # even in log t, since the weight is of order 1/t there
    grid = torch.logspace(-5, 0, 400_001, dtype=torch.float64)
    if objective.diffusion.schedule.steps:
        grid = torch.arange(1, 1001, dtype=torch.float64) / 1000
        expected = (objective.weight(grid).flatten() * torch.cos(grid)).mean()
    else:
        values = objective.weight(grid).flatten() * torch.cos(grid)
        expected = torch.trapezoid(values, grid) / (1 - 1e-5)
    assert (w * torch.cos(t)).mean().item() == pytest.approx(expected.item(), rel=2e-3)


def test_log_normal_times() -> None:
    objective = Objective(
        LossConfig(times=TimeSampling.log_normal, log_mean=-0.4, log_std=0.7), diffusion("vp", "edm"), PredictionType.v
    )
    t, W = objective.sample_times(UNIFORM)
    log_r = torch.log(objective.diffusion.sigma(t) / objective.diffusion.alpha(t))
    assert log_r.mean().item() == pytest.approx(-0.4, abs=1e-3)
    assert log_r.std().item() == pytest.approx(0.7, abs=1e-2)
    assert (W == 1).all()


def test_log_normal_on_the_flow_is_a_logit_normal_time() -> None:
    """Esser et al. 2024, equation 19: logit(t) ~ N(m, s)."""
    objective = Objective(
        LossConfig(times=TimeSampling.log_normal, log_mean=0.3, log_std=1.0), diffusion("vp", "flow"), PredictionType.v
    )
    logit = torch.logit(objective.sample_times(UNIFORM)[0])
    assert (logit.mean().item(), logit.std().item()) == (pytest.approx(0.3, abs=1e-3), pytest.approx(1.0, abs=1e-2))


def test_uniform_times_reach_from_t_min_to_1() -> None:
    objective = Objective(LossConfig(t_min=0.1), diffusion("vp", "cosine"), PredictionType.eps)
    t, _ = objective.sample_times(torch.tensor([0.0, 0.5, 1 - 1e-12], dtype=torch.float64))
    np.testing.assert_allclose(t, [1.0, 0.55, 0.1], atol=1e-9)


@pytest.mark.parametrize("draw", list(TimeSampling))
def test_tables_are_trained_on_their_times(draw: TimeSampling) -> None:
    config = LossConfig(times=draw, weighting=Weighting.min_snr)
    t, _ = Objective(config, diffusion("vp", "ddpm_linear"), PredictionType.eps).sample_times(UNIFORM)
    assert torch.equal(torch.round(t * 1000) / 1000, t)
    assert t.min() >= 1 / 1000
    assert t.max() == 1.0 if draw is not TimeSampling.log_normal else t.max() <= 1.0


@pytest.mark.parametrize(
    ("process", "schedule", "config", "said"),
    [
        ("psld", "constant", {"weighting": Weighting.min_snr}, "weighting=min_snr.*use simple or likelihood"),
        ("cld", "constant", {"times": TimeSampling.log_normal}, "times=log_normal.*use uniform or importance"),
        ("vp", "flow", {"weighting": Weighting.likelihood}, "infinite at t = 1"),
        ("vp", "flow", {"times": TimeSampling.importance}, "infinite at t = 1"),
        ("vp", "linear", {"t_min": 0.0}, "t_min=0.0"),
        ("vp", "linear", {"snr_limit": 0.0}, "snr_limit=0.0"),
        ("vp", "linear", {"log_std": math.nan}, "log_std=nan"),
    ],
)
def test_refuses(process: str, schedule: str, config: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Objective(LossConfig(**config), diffusion(process, schedule), PredictionType.v)
