"""Matrix functions against exact arithmetic."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch

from dvae.diffusion.linalg import matrix_exp_and_expm1


@pytest.mark.parametrize("damping", [-1.0, -1e-3, 0.0, 1e-3, 1.0])
def test_the_closed_form_of_2x2_exponentials(damping: float) -> None:
    """Under-, critically and overdamped, against 40 digits; expm1 keeps its digits for small arguments."""
    X = np.array([[-0.7, 1.3], [damping / 1.3, -0.7]])
    for scale in (1e-8, 1e-3, 1.0, 7.0):
        exp, expm1 = (m[0].numpy() for m in matrix_exp_and_expm1(torch.from_numpy(scale * X)[None]))
        with mpmath.workdps(40):
            exact = mpmath.expm(mpmath.matrix((scale * X).tolist()))
            less_one = np.array((exact - mpmath.eye(2)).tolist(), dtype=float)
            exact = np.array(exact.tolist(), dtype=float)
        np.testing.assert_allclose(exp, exact, rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(expm1, less_one, rtol=2e-13, atol=1e-15 * scale)
