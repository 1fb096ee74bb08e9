"""Linear algebra with the small matrices of a process, and their action on states.

Matrices are (k, k), or (B, k, k) with one matrix per sample. k is the number of components per channel.
"""

from __future__ import annotations

import torch


def apply_matrix(matrix: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Apply a matrix (j, k), or one per sample (B, j, k), to the components of u (B, k*C, H, W).

    The result is (B, j*C, H, W), with the dtype and device of u.
    """
    matrix = matrix.to(u.device, u.dtype).reshape(-1, *matrix.shape[-2:])[..., None, None, None]
    if matrix.shape[1] == matrix.shape[2] == 1:
        return matrix[:, 0, 0] * u
    # a product and a sum instead of a matrix product, because autocast would run a matrix product in bfloat16
    return (matrix * u.unflatten(1, (matrix.shape[2], -1))[:, None]).sum(2).flatten(1, 2)


def matrix_sqrt(S: torch.Tensor) -> torch.Tensor:
    """Return the symmetric square root of S (B, k, k), which must be positive semi-definite. S can be singular."""
    # not the Cholesky factor, because it needs a positive definite matrix, and D is often singular
    values, vectors = torch.linalg.eigh(S)
    return (vectors * values.clamp(min=0.0).sqrt()[:, None, :]) @ vectors.mT


def per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshape values (B,) to (B, 1, ..., 1), with the number of dimensions, dtype and device of `like`."""
    return values.to(like.device, like.dtype).view(-1, *[1] * (like.ndim - 1))


def matrix_exp_and_expm1(X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (expm(X), expm(X) - I), each (B, k, k), for X (B, k, k).

    The second matrix is accurate in every entry even if X is small.
    """
    if X.shape[-1] == 1:
        return torch.exp(X), torch.expm1(X)
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    exp = _exp_2x2(X) if X.shape[-1] == 2 else torch.linalg.matrix_exp(X)
    small = X.abs().sum(-1).amax(-1)[:, None, None] < 1.0
    X_small = torch.where(small, X, 0.0)
    series = eye.expand_as(X)
    for n in range(20, 1, -1):  # Horner's rule for I + X/2! + X^2/3! + ...; X times this series is expm(X) - I
        series = eye + X_small @ series / n
    return exp, torch.where(small, X_small @ series, exp - eye)


def _exp_2x2(X: torch.Tensor) -> torch.Tensor:
    """Return expm(X) for X (B, 2, 2), as e^h (cosh(d) I + sinh(d)/d N).

    Here h = tr(X)/2, N = X - h I and N^2 = d^2 I. The process is underdamped for d^2 < 0, critically damped for d = 0
    (CLD and PSLD: e^h (I + N)) and overdamped for d^2 > 0.
    """
    eye = torch.eye(2, dtype=X.dtype, device=X.device)
    h = 0.5 * X.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    N = X - h * eye
    d2 = -torch.linalg.det(N)[:, None, None]
    cosh = 1.0 + 0.5 * d2 * _sinhc(0.25 * d2) ** 2  # cosh(d) = 1 + 2 sinh(d/2)^2
    return torch.exp(h) * (cosh * eye + _sinhc(d2) * N)


def _sinhc(d2: torch.Tensor) -> torch.Tensor:
    """Return sinh(d)/d as a function of d^2, which can be negative. It is sin(|d|)/|d| for d^2 < 0.

    If |d^2| is small, the series of sinh(d)/d is used, because the quotient is not defined at d = 0.
    """
    d = d2.abs().sqrt().clamp(min=1e-3)
    far = torch.where(d2 > 0, torch.sinh(d), torch.sin(d)) / d
    return torch.where(d2.abs() < 1e-2, 1 + d2 / 6 * (1 + d2 / 20 * (1 + d2 / 42 * (1 + d2 / 72))), far)
