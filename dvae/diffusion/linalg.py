"""Linear algebra on the small matrices of a process, and how they act on states.

Matrices are (k, k), or (B, k, k) with one matrix per sample, and k is the number of components per channel.
"""

from __future__ import annotations

import torch


def apply_matrix(matrix: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """matrix (j, k), or (B, j, k), on the components of u (B, k*C, H, W): (B, j*C, H, W) in u's dtype and device."""
    matrix = matrix.to(u.device, u.dtype).reshape(-1, *matrix.shape[-2:])[..., None, None, None]
    if matrix.shape[1] == matrix.shape[2] == 1:
        return matrix[:, 0, 0] * u
    # written out, because autocast would run a matrix product in bfloat16
    return (matrix * u.unflatten(1, (matrix.shape[2], -1))[:, None]).sum(2).flatten(1, 2)


def matrix_sqrt(S: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of S (B, k, k), positive semi-definite: S may be singular, as D often is."""
    values, vectors = torch.linalg.eigh(S)
    return (vectors * values.clamp(min=0.0).sqrt()[:, None, :]) @ vectors.mT


def per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """values (B,) as (B, 1, 1, 1), with as many dimensions as `like`, in its dtype and on its device."""
    return values.to(like.device, like.dtype).view(-1, *[1] * (like.ndim - 1))


def matrix_exp_and_expm1(X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(expm(X), expm(X) - I), each (B, k, k); every entry of the second keeps its digits where X is small."""
    if X.shape[-1] == 1:
        return torch.exp(X), torch.expm1(X)
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    exp = _exp_2x2(X) if X.shape[-1] == 2 else torch.linalg.matrix_exp(X)
    small = X.abs().sum(-1).amax(-1)[:, None, None] < 1.0
    X_small = torch.where(small, X, 0.0)
    series = eye.expand_as(X)
    for n in range(20, 1, -1):  # I + X/2! + X^2/3! + ..., and X times that is expm(X) - I
        series = eye + X_small @ series / n
    return exp, torch.where(small, X_small @ series, exp - eye)


def _exp_2x2(X: torch.Tensor) -> torch.Tensor:
    """expm(X) = e^h (cosh(d) I + sinh(d)/d N) with h = tr(X)/2, N = X - h I, N^2 = d^2 I; (B, 2, 2).

    d^2 < 0 is underdamped, d = 0 critically damped (CLD, PSLD: e^h (I + N)), d^2 > 0 overdamped.
    """
    eye = torch.eye(2, dtype=X.dtype, device=X.device)
    h = 0.5 * X.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    N = X - h * eye
    d2 = -torch.linalg.det(N)[:, None, None]
    cosh = 1.0 + 0.5 * d2 * _sinhc(0.25 * d2) ** 2
    return torch.exp(h) * (cosh * eye + _sinhc(d2) * N)


def _sinhc(d2: torch.Tensor) -> torch.Tensor:
    """sinh(d)/d as a function of d^2 of either sign; by its series where |d^2| is small."""
    d = d2.abs().sqrt().clamp(min=1e-3)
    far = torch.where(d2 > 0, torch.sinh(d), torch.sin(d)) / d
    return torch.where(d2.abs() < 1e-2, 1 + d2 / 6 * (1 + d2 / 20 * (1 + d2 / 42 * (1 + d2 / 72))), far)
