"""Log-likelihood through the probability flow, in bits per dimension (Song et al. 2021, section 4.3).

Along the flow d log p(u_t) = -div(velocity), so log p(u) at t_min is log N(u_1; 0, S_inf) plus the integral of the
divergence from t_min to 1. For k = 1, u = x. For k > 1 the other components m are drawn from their start q(m), and

    log p(x) >= E_m[log p(x, m)] + H(q) = E_m[log p(x, m) - log q(m)],     with the gap KL(q(m) || p(m | x))

(Dockhorn et al. 2022, appendix B.3). The second form is the one used: what a draw of m adds to both nearly cancels.

An 8-bit image is a bin of width 2/255 in [-1, 1] per pixel and channel. With x drawn uniformly in its bin, which is
`dequantize`, n = C H W, and the clean state data_scale * (x - shift),

    bits per dimension = -(log p(clean state) / n + log(data_scale)) / log 2 + log2(255 / 2)

bounds from above the bits that a lossless code of the image needs, in expectation over the draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dvae.diffusion.conditioning import Conditioning
from dvae.diffusion.denoiser import Denoiser
from dvae.diffusion.guidance import GuidedDenoiser
from dvae.diffusion.linalg import apply_matrix
from dvae.diffusion.probability_flow import MIN_SQRT_CLOCK, sqrt_clock
from dvae.diffusion.rk45 import Velocity, integrate
from dvae.diffusion.sampler_model import SamplerModel
from dvae.errors import UserError
from dvae.utils import rng


@dataclass(frozen=True)
class Likelihood:
    bits_per_dim: torch.Tensor
    """Of each 8-bit image, (B,), float64; for k > 1 an upper bound."""
    log_density: torch.Tensor
    """log p of each clean state, in nats, (B,), float64; for k > 1 a lower bound."""
    nfe: torch.Tensor
    """Network evaluations of each sample, (B,), int64; those of its gradient are not counted."""


def dequantize(images: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """x from images in {0..255} and draws in [0, 1), same shape: uniform in the bin around each level, in [-1, 1]."""
    return (images.to(uniform.dtype) + uniform - 0.5) / 127.5 - 1.0


def estimate(
    denoiser: Denoiser,
    conditioning: Conditioning,
    images: torch.Tensor,
    numbers: Sequence[int],
    seed: int,
    tolerance: float,
) -> Likelihood:
    """Likelihood of images (B, C, H, W) uint8 under the refiner, given `conditioning`.

    One draw of dequantization, of the momentum where k > 1, and of the probe of the divergence per image, keyed by the
    image's number.
    """
    shapes, device = denoiser.shapes, conditioning.z.device
    shape = (shapes.k * shapes.channels, shapes.image_size, shapes.image_size)
    x = dequantize(images, rng.uniform(seed, "dequantise", numbers, images.shape[1:]).float())
    probes = rng.uniform(seed, "probe", numbers, shape).sub(0.5).sign().float()
    return bits_per_dim(
        GuidedDenoiser(denoiser, conditioning),
        denoiser.to_state(x.to(device), conditioning),
        noise=rng.normal(seed, "momentum", numbers, shape).to(device),
        probes=probes.to(device),
        data_scale=float(denoiser.data_scale),
        tolerance=tolerance,
    )


@torch.no_grad()
def bits_per_dim(
    model: SamplerModel,
    x: torch.Tensor,
    *,
    noise: torch.Tensor | None = None,
    probes: torch.Tensor | None = None,
    data_scale: float = 1.0,
    t_min: float = 1e-5,
    tolerance: float = 1e-5,
) -> Likelihood:
    """Likelihood of clean states x (B, C, H, W) = data_scale * (image - shift).

    noise: for k > 1, standard normal (B, k*C, H, W): draws the components beside the image; average over draws.
    probes: +1 and -1 with equal chance, (B, k*C, H, W): the divergence is estimated with them (Hutchinson 1989),
    unbiased; none: it is exact, at k*C*H*W gradients per evaluation.
    t_min: where the flow starts, with u = (x, m) as it is; in (0, 1), or where sqrt(B) is 1e-3, if that is later: on
    the linear clock that is 1e-5, as Song et al. have it, but on edm 1e-5 is a noise of 1e-33, which a network's x0 is
    divided by twice. Whatever the start, the density is one: that of the model's states there.

    Raises UserError on a schedule whose B is infinite at t = 1, ValueError where noise is missing. The model must be
    differentiable in u (not with classifier guidance).
    """
    diffusion, n = model.diffusion, x[0].numel()
    if diffusion.schedule.zero_terminal_snr:
        raise UserError(
            f"likelihood: schedule {type(diffusion.schedule).__name__} has no finite end at t = 1: evaluate a run with "
            "another schedule, such as linear"
        )
    if diffusion.k > 1 and noise is None:
        raise ValueError(f"the components beside the image (k = {diffusion.k}) need noise to be drawn from")
    u = diffusion.initial_state(x, noise)
    state = torch.cat([u.flatten(1), u.new_zeros(len(u), 1)], dim=1)
    flow = _flow_and_divergence(model, u.shape[1:], probes)
    start = max(sqrt_clock(diffusion, t_min), MIN_SQRT_CLOCK)
    end = integrate(flow, state, start, sqrt_clock(diffusion, 1.0), tolerance)
    u_1, change = end.y[:, :-1].view_as(u), end.y[:, -1].double().cpu()
    log_density = _log_normal(u_1, diffusion.S_inf) + change
    if diffusion.k > 1:
        log_density = log_density - _log_normal(u[:, x.shape[1] :], torch.as_tensor(diffusion.process.S_0)[1:, 1:])
    bits = -(log_density / n + math.log(data_scale)) / math.log(2.0) + math.log2(127.5)
    return Likelihood(bits, log_density, end.evaluations * model.nfe_per_call)


def _flow_and_divergence(model: SamplerModel, shape: torch.Size, probes: torch.Tensor | None) -> Velocity:
    """d/dr of (u, integral of the divergence), flattened to (n, k*C*H*W + 1), with r = sqrt(B)."""
    diffusion = model.diffusion
    trace_A = float(diffusion.A.trace()) * shape.numel() / diffusion.k

    def velocity(state: torch.Tensor, r: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        t = diffusion.schedule.inverse(r**2).clamp(max=1.0)
        with torch.enable_grad():
            u = state[:, :-1].view(-1, *shape).detach().requires_grad_()
            pull = apply_matrix(diffusion.D, model[rows](u, t).score)
            trace = _exact_trace(pull, u) if probes is None else _estimated_trace(pull, u, probes[rows])
        drift = apply_matrix(diffusion.A, u.detach()) - pull.detach()
        rate = torch.cat([drift.flatten(1), (trace_A - trace)[:, None]], dim=1)
        return (2.0 * r).to(rate.device, rate.dtype)[:, None] * rate

    return velocity


def _estimated_trace(f: torch.Tensor, u: torch.Tensor, probe: torch.Tensor) -> torch.Tensor:
    """probe^T (df/du) probe, (n,), whose mean over probes is the trace."""
    (product,) = torch.autograd.grad((f * probe).sum(), u)
    return (product * probe).flatten(1).sum(1)


def _exact_trace(f: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Trace of df/du, (n,)."""
    trace = u.new_zeros(len(u))
    for i, element in enumerate(f.flatten(1).unbind(1)):
        (gradient,) = torch.autograd.grad(element.sum(), u, retain_graph=True)
        trace = trace + gradient.flatten(1)[:, i]
    return trace


def _log_normal(u: torch.Tensor, S: torch.Tensor) -> torch.Tensor:
    """log N(u; 0, S), summed over channels and pixels, (B,), float64."""
    u = u.double().cpu()
    square = (u * apply_matrix(torch.linalg.inv(S), u)).flatten(1).sum(1)
    return -0.5 * (square + u[0].numel() / len(S) * torch.logdet(2.0 * math.pi * S))
