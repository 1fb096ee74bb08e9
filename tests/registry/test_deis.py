"""DEIS: its coefficients, what its order 1 is, and its orders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from closed_forms import Mixture, diffusion, normal
from linear_gaussian import CASES, MEAN, VARIANCE, Numbers, build, exact_images, flow
from scipy.integrate import quad_vec, solve_ivp
from scipy.linalg import expm

from dvae.diffusion.kernels import Matching
from dvae.registry.samplers.deis import coefficients


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("case", [case for case in CASES if "ddpm" not in case])  # a table's t(B) has kinks
def test_coefficients_are_the_integrals(case: str, order: int) -> None:
    """With O from its definition: R' = (A + D S^-1) R, R = L O."""
    d = CASES[case]
    n, (t, s), times = Numbers(d), (0.5, 0.3), (0.9, 0.7, 0.5)[-order:]
    C, turn = coefficients(d, t, s, times)

    def pull(B: float) -> np.ndarray:
        return n.D @ np.linalg.inv(n.at(B, n.known)[1])

    L_t, L_s = (d.marginal(time)[1][0].numpy() for time in (t, s))
    R = solve_ivp(
        lambda B, R: ((n.A + pull(B)) @ R.reshape(n.k, n.k)).ravel(), (n.B(t), n.B(s)), L_t.ravel(),
        method="DOP853", rtol=1e-12, atol=1e-12, dense_output=True,
    ).sol  # fmt: skip
    np.testing.assert_allclose(turn, np.linalg.inv(L_s) @ R(n.B(s)).reshape(n.k, n.k), atol=1e-8)

    def integrand(B: float) -> np.ndarray:
        time = d.schedule.inverse(torch.tensor(B, dtype=torch.float64)).item()
        lagrange = [np.prod([(time - q) / (p - q) for q in times if q != p]) for p in times]
        return np.multiply.outer(lagrange, expm(n.A * (n.B(s) - B)) @ pull(B) @ R(B).reshape(n.k, n.k))

    expected = -quad_vec(integrand, n.B(s), n.B(t), epsabs=1e-11)[0]
    np.testing.assert_allclose(C, expected, atol=1e-8)


@pytest.mark.parametrize("steps", [2, 10])
@pytest.mark.parametrize(
    ("schedule", "tolerance"),
    [("linear", 1e-10), ("ddpm_linear", 1e-10), ("constant", 1e-10), ("cosine", 1e-9), ("sigmoid", 1e-9)],
)
def test_order_1_is_ddim_on_vp(schedule: str, steps: int, tolerance: float) -> None:
    """Where alpha(1) is 5e-5 (cosine, sigmoid) the rounding of eps, divided by it, is all that is left."""
    d = diffusion("vp", schedule)
    model, u = Mixture(d, (-0.6, 0.5), (0.01, 0.04), (0.4, 0.6)), normal(0, 32, 1, 1, 1)
    ends = [
        build(name, steps=steps, spacing="uniform", **fields).sample(model, u, normal).u
        for name, fields in [("deis", {"order": 1}), ("ddim", {"eta": 0.0})]
    ]
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", ["psld", "cld", "underdamped", "third order"])
def test_order_1_is_exact_for_one_image(case: str) -> None:
    """As ddim is. Variance 1e-20 stands for none, from t = 1 to 0.05 in a single step."""
    d, u = CASES[case], CASES[case].sample_prior(normal(0, 5, CASES[case].k, 1, 1))
    eps = Mixture(d, (MEAN,), (1e-20,))(u, 1.0).eps
    C, _ = coefficients(d, 1.0, 0.05, (1.0,))
    found = (expm(-d.A.numpy() * d.elapsed(0.05, 1.0).item()) @ u[..., 0, 0].numpy()[..., None])[..., 0]
    found = found + (C[0].numpy() @ eps[..., 0, 0].numpy()[..., None])[..., 0]
    np.testing.assert_allclose(found, flow(Numbers(d, 1e-20), 1.0, 0.05, u[..., 0, 0].numpy()), atol=1e-6)


@pytest.mark.parametrize("matching", list(Matching))
@pytest.mark.parametrize("process", ["psld", "cld"])
def test_a_long_first_step_is_taken_in_single_precision(process: str, matching: Matching) -> None:
    """On cosine B falls from 20 to 6 in the first of 25 steps, over which Phi(s, t) is 1e6 and more."""
    d = diffusion(process, "cosine", matching=matching)
    model, u = Mixture(d, (MEAN,), (1e-6,)), d.sample_prior(normal(0, 64, d.k, 1, 1)).float()
    end = build("deis", d.k, steps=25, t_min=1e-3, spacing="uniform").sample(model, u, normal).u
    torch.testing.assert_close(end[:, :1], torch.full_like(end[:, :1], MEAN), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("case", "order", "found"),
    [
        ("vp linear", 1, 1.00), ("vp linear", 2, 1.97), ("vp linear", 3, 2.88),
        ("psld", 1, 0.94), ("psld", 2, 1.84), ("psld", 3, 2.83),
        ("cld", 3, 2.66),
    ],
)  # fmt: skip
def test_converges_at_its_order(case: str, order: int, found: float) -> None:
    """On the quadratic grid, t_min = 1e-3, from 40 to 80 steps (from 80 to 160, on psld: 0.97, 1.93, 2.94)."""
    d = CASES[case]
    u = d.sample_prior(normal(0, 8, d.k, 1, 1))
    exact, error = exact_images(d, u, 1e-3), []
    for n in (40, 80):
        end = build("deis", d.k, order=order, steps=n, t_min=1e-3).sample(Mixture(d, (MEAN,), (VARIANCE,)), u, normal)
        error.append(np.sqrt(np.mean((end.u[:, 0, 0, 0].numpy() - exact) ** 2)))
    measured = np.log2(error[0] / error[1])
    assert measured == pytest.approx(found, abs=0.05)
    assert measured > order - 0.4
