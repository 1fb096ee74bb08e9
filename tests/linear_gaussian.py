"""Gaussian data under linear processes, in NumPy and SciPy from D, Q, S_inf and the clock alone."""

from __future__ import annotations

import numpy as np
import torch
from closed_forms import diffusion
from scipy.integrate import solve_ivp
from scipy.linalg import expm

from dvae.diffusion.kernels import Diffusion, Factor, Matching
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.processes.base import Process
from dvae.registry.samplers.base import SAMPLERS, Sampler
from dvae.registry.schedules.base import SCHEDULES

MEAN, VARIANCE = 0.3, 0.25


class Own(Process):
    """A process that no paper has."""

    def __init__(self, D: list, Q: list, S_inf: list) -> None:
        self.D, self.Q, self.S_inf = np.array(D), np.array(Q), np.array(S_inf)


Own.Config = ComponentConfig
UNDERDAMPED = Own([[0.2, 0.1], [0.1, 0.6]], [[0.0, -1.0], [1.0, 0.0]], [[1.0, 0.2], [0.2, 0.5]])
THIRD_ORDER = Own(
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.5]],
    [[0.0, -0.7, 0.0], [0.7, 0.0, -0.9], [0.0, 0.9, 0.0]],
    [[1.0, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.7]],
)
CONSTANT = SCHEDULES.build({"name": "constant", "beta": 12.0}, Shapes(image_size=1))
CASES = {
    "vp linear": diffusion("vp", "linear"),
    "vp ddpm_linear": diffusion("vp", "ddpm_linear"),
    "psld": diffusion("psld", "constant"),
    "psld linear": diffusion("psld", "linear"),
    "psld upper dsm": diffusion("psld", "constant", matching=Matching.dsm, factor=Factor.upper),
    "cld": diffusion("cld", "constant"),
    "underdamped": Diffusion(UNDERDAMPED, CONSTANT),
    "third order": Diffusion(THIRD_ORDER, CONSTANT),
}


def build(name: str, k: int = 1, **fields) -> Sampler:
    return SAMPLERS.build({"name": name, "threshold": "none", **fields}, Shapes(image_size=1, channels=1, k=k))


class Numbers:
    """The process, its Gaussian data and their score, from D, Q, S_inf and the clock alone."""

    def __init__(self, d: Diffusion, variance: float = VARIANCE) -> None:
        process, self.k, self.schedule = d.process, d.k, d.schedule
        self.D, Q, self.S_inf = process.D, process.Q, process.S_inf
        self.inv = np.linalg.inv(self.S_inf)
        self.A, self.A_back = -(self.D + Q) @ self.inv, -(self.D - Q) @ self.inv
        self.start = process.S_0.copy()  # of u at t = 0: of the data as a whole, and with the image known
        self.known = process.S_0 if d.matching is Matching.hsm else np.zeros_like(self.D)
        self.start[0, 0] = variance
        self.mean = np.eye(self.k)[0] * MEAN

    def B(self, t: float) -> float:
        return float(self.schedule.integral(torch.tensor(t, dtype=torch.float64)))

    def at(self, B: float, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        Phi = expm(self.A * B)
        return Phi, self.S_inf + Phi @ (start - self.S_inf) @ Phi.T

    def score(self, B: float) -> tuple[np.ndarray, np.ndarray]:
        """(G, g): the score is G u + g."""
        Phi, S = self.at(B, self.start)
        G = -np.linalg.inv(S)
        return G, -G @ Phi @ self.mean

    def x0(self, B: float) -> tuple[np.ndarray, np.ndarray]:
        """(G, g): E[x0 | u] is G u + g."""
        gain = VARIANCE * self.at(B, self.start)[0][:, :1].T @ -self.score(B)[0]
        return gain, np.array([MEAN]) - gain @ self.at(B, self.start)[0] @ self.mean


def flow(n: Numbers, start: float, end: float, u: np.ndarray) -> np.ndarray:
    """The exact probability flow of Gaussian data from u (N, k) at `start` to `end`, by SciPy in r = sqrt(B)."""

    def velocity(r: float, flat: np.ndarray) -> np.ndarray:
        (G, g), u = n.score(r**2), flat.reshape(-1, n.k)
        return (2 * r * (u @ (n.A - n.D @ G).T - n.D @ g)).ravel()

    span = np.sqrt([n.B(start), n.B(end)])
    return solve_ivp(velocity, span, u.ravel(), method="DOP853", rtol=1e-11, atol=1e-11).y[:, -1].reshape(-1, n.k)


def exact_images(d: Diffusion, u: torch.Tensor, t_min: float) -> np.ndarray:
    """What the flow from u (N, k, 1, 1) and the denoising step at t_min make, (N,)."""
    n = Numbers(d)
    G, g = n.x0(n.B(t_min))
    return (flow(n, 1.0, t_min, u[:, :, 0, 0].numpy()) @ G.T + g)[:, 0]
