"""Likelihood of data whose density is known, and the gap of the bound for k > 1, in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from closed_forms import Mixture, diffusion, normal
from scipy.linalg import expm

from dvae.diffusion.kernels import Diffusion, Prediction, Time
from dvae.diffusion.likelihood import bits_per_dim, dequantize
from dvae.diffusion.sampler_model import Threshold
from dvae.errors import UserError

MEAN, VARIANCE = 0.3, 0.25
BITS = math.log2(127.5)
"""Of a pixel under the uniform density of 1 per unit of [-1, 1]."""


def log_normal(x: np.ndarray, mean: float, variance: float) -> np.ndarray:
    return -0.5 * ((x - mean) ** 2 / variance + np.log(2 * math.pi * variance))


def images(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


# of the data, for the mean over images: a rule of 5 nodes is exact up to the 9th power
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(5)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
NODES = MEAN + math.sqrt(VARIANCE) * NODES


@pytest.mark.parametrize("schedule", ["linear", "ddpm_linear", "cosine"])
@pytest.mark.parametrize("exact", [True, False])
def test_bits_of_gaussian_data(schedule: str, exact: bool) -> None:
    """Their mean is the entropy, 1/2 log2(2 pi e v), to 1e-3; each to 1e-2, since p_1 is N(0, 1) only nearly."""
    x = images(*NODES)
    found = bits_per_dim(
        Mixture(diffusion("vp", schedule), (MEAN,), (VARIANCE,)), x, probes=None if exact else torch.ones_like(x)
    )
    assert WEIGHTS @ found.bits_per_dim.numpy() == pytest.approx(
        0.5 * math.log2(2 * math.pi * math.e * VARIANCE) + BITS, abs=1e-3
    )
    np.testing.assert_allclose(found.bits_per_dim, -log_normal(NODES, MEAN, VARIANCE) / math.log(2) + BITS, atol=1e-2)
    assert found.nfe.min() > 20


class Rounded(Mixture):
    """The same, its score made of its x0 in fp32, as that of a network that predicts x0."""

    def __call__(self, u: torch.Tensor, t: Time, *, threshold: Threshold = Threshold.none) -> Prediction:
        x0 = self.x0(u, t)
        eps = self.diffusion.eps_from_x0(u, t, x0)
        return Prediction(eps, x0, self.diffusion.score_from_eps(eps, t))


@pytest.mark.parametrize("schedule", ["edm", "linear"])
def test_the_start_is_no_nearer_the_data_than_fp32_can_tell(schedule: str) -> None:
    """edm's noise at t = 1e-5 is 1e-33: without a floor the score of x0 overflows there."""
    x = images(*NODES).float()
    found = bits_per_dim(Rounded(diffusion("vp", schedule), (MEAN,), (VARIANCE,)), x, probes=torch.ones_like(x))
    np.testing.assert_allclose(found.bits_per_dim, -log_normal(NODES, MEAN, VARIANCE) / math.log(2) + BITS, atol=2e-2)
    assert found.nfe.max() < 200


def test_density_of_two_modes() -> None:
    means, variances, weights = (-0.6, 0.5), (0.01, 0.04), (0.4, 0.6)
    x = np.linspace(-0.9, 1.0, 9)
    model = Mixture(diffusion("vp", "cosine"), means, variances, weights)
    expected = sum(w * np.exp(log_normal(x, m, v)) for m, v, w in zip(means, variances, weights, strict=True))
    np.testing.assert_allclose(bits_per_dim(model, images(*x)).log_density, np.log(expected), atol=2e-3)


def test_dimensions_add_up_and_the_scale_of_the_data_cancels() -> None:
    """An image of independent pixels has the mean of their bits; twice the data at data_scale 2 have the same bits."""
    d, x = diffusion("vp", "cosine"), MEAN + 0.5 * normal(0, 2, 3, 2, 2)
    model = Mixture(d, (MEAN,), (VARIANCE,))
    whole = bits_per_dim(model, x).bits_per_dim
    pixels = bits_per_dim(model, x.view(-1, 1, 1, 1)).bits_per_dim
    torch.testing.assert_close(whole, pixels.view(2, -1).mean(1), rtol=0, atol=1e-4)
    doubled = bits_per_dim(Mixture(d, (2 * MEAN,), (4 * VARIANCE,)), 2 * x, data_scale=2.0).bits_per_dim
    torch.testing.assert_close(doubled, whole, rtol=0, atol=1e-4)


PHASE = {
    "psld": diffusion("psld", "constant", fields={"beta": 16.0}),
    "cld": diffusion("cld", "constant", fields={"beta": 16.0}),
}


def bound_in_closed_form(d: Diffusion, x: np.ndarray, t_min: float) -> tuple[np.ndarray, np.ndarray]:
    """(log p(x), gap), where p is that of u at t_min, and the gap KL(q(m) || p(m | x)) with q(m) = N(0, S_0)."""
    S_0 = d.process.S_0[1, 1]
    Phi = expm(d.A.numpy() * float(d.elapsed(0.0, t_min)))
    S = d.process.S_inf + Phi @ (np.diag([VARIANCE, S_0]) - d.process.S_inf) @ Phi.T
    mean = Phi[:, 0] * MEAN
    v = S[1, 1] - S[0, 1] ** 2 / S[0, 0]  # of m given x
    m = mean[1] + S[0, 1] / S[0, 0] * (x - mean[0])
    return log_normal(x, mean[0], S[0, 0]), 0.5 * (S_0 / v + m**2 / v - 1 - np.log(S_0 / v))


@pytest.mark.parametrize("case", PHASE)
@pytest.mark.parametrize("t_min", [1e-5, 1e-2])
def test_the_bound_holds_and_its_gap_is_the_divergence(case: str, t_min: float) -> None:
    """log p(x, m) is quadratic in m, so its mean over N(0, S_0) is that over m = +-sqrt(S_0)."""
    d, x = PHASE[case], np.array([-0.4, 0.3, 0.9])
    both = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(3).view(-1, 1, 1, 1).expand(-1, 2, 1, 1)
    found = bits_per_dim(
        Mixture(d, (MEAN,), (VARIANCE,)), images(*x).repeat(2, 1, 1, 1), noise=both, t_min=t_min, tolerance=1e-4
    )
    bound = found.log_density.view(2, 3).mean(0).numpy()
    density, gap = bound_in_closed_form(d, x, t_min)
    np.testing.assert_allclose(density - bound, gap, atol=2e-3)
    assert (bound < density + 2e-3).all()
    assert t_min < 1e-4 or gap.min() > 0.01
    np.testing.assert_allclose(found.bits_per_dim, -found.log_density / math.log(2) + BITS, atol=1e-12)


def test_probes_average_to_the_exact_divergence() -> None:
    """Of x and m of one pixel there are two essentially different probes, (1, 1) and (1, -1)."""
    model = Mixture(PHASE["psld"], (-0.6, 0.5), (0.05, 0.1), (0.4, 0.6))
    x, noise, signs = images(0.2, 0.2), normal(0, 1, 2, 1, 1).repeat(2, 1, 1, 1), torch.ones(2, 2, 1, 1).double()
    signs[1, 1] = -1.0
    exact = bits_per_dim(model, x[:1], noise=noise[:1], t_min=1e-2, tolerance=1e-4).log_density
    one, other = bits_per_dim(model, x, noise=noise, probes=signs, t_min=1e-2, tolerance=1e-4).log_density
    assert abs(one - other) > 0.01
    assert (0.5 * (one + other)).item() == pytest.approx(exact.item(), abs=1e-3)


def test_the_draw_of_m_hardly_matters() -> None:
    """log q(m) varies by 0.7 over draws; it is taken off, not its mean."""
    noise = normal(0, 6, 2, 1, 1)
    found = bits_per_dim(Mixture(PHASE["psld"], (MEAN,), (VARIANCE,)), images(0.2).repeat(6, 1, 1, 1), noise=noise)
    assert (0.5 * noise[:, 1] ** 2).std() > 0.3
    assert found.log_density.std() < 0.01


def test_an_image_does_not_feel_its_batch() -> None:
    d, x = diffusion("vp", "linear"), 0.5 * normal(0, 3, 1, 2, 2)
    probes = normal(1, 3, 1, 2, 2).sign()
    model = Mixture(d, (-0.6, 0.5), (0.01, 0.04), (0.4, 0.6))
    whole = bits_per_dim(model, x, probes=probes, tolerance=1e-3)
    for i in range(3):
        alone = bits_per_dim(model, x[i : i + 1], probes=probes[i : i + 1], tolerance=1e-3)
        assert torch.equal(alone.log_density[0], whole.log_density[i])
        assert torch.equal(alone.nfe[0], whole.nfe[i])


def test_dequantized_fills_the_bins() -> None:
    """Each level keeps its value in [-1, 1] in the middle of its bin, and neighboring bins meet."""
    levels = torch.arange(256, dtype=torch.uint8)
    low, middle, high = (dequantize(levels, torch.full((256,), share, dtype=torch.float64)) for share in (0, 0.5, 1))
    torch.testing.assert_close(middle, levels.double() / 127.5 - 1.0)
    torch.testing.assert_close(high[:-1], low[1:])
    # a uniform density over all bins needs 8 bits
    assert math.log2(high[-1] - low[0]) + BITS == pytest.approx(8.0, abs=1e-12)


def test_refuses() -> None:
    with pytest.raises(UserError, match="no finite end at t = 1"):
        bits_per_dim(Mixture(diffusion("vp", "flow")), images(0.0))
    with pytest.raises(ValueError, match="noise"):
        bits_per_dim(Mixture(PHASE["psld"]), images(0.0))
