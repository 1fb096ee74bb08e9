"""Log-likelihood from the probability flow, in bits per dimension (Song et al. 2021, section 4.3).

Along the flow, d log p(u_t) = -div(velocity). So log p(u) at t_min is log N(u_1; 0, S_inf) plus the integral of the
divergence from t_min to 1. For k = 1, u = x. For k > 1, the other components m are drawn from their initial
distribution q(m), and

    log p(x) >= E_m[log p(x, m)] + H(q) = E_m[log p(x, m) - log q(m)],     with the gap KL(q(m) || p(m | x))

(Dockhorn et al. 2022, appendix B.3). The code uses the second form, because the contributions of a draw of m to its two
terms nearly cancel.

An 8-bit image is a bin of width 2/255 in [-1, 1] per pixel and channel. `dequantize` draws x uniformly in its bin. Let
n = C H W, and let data_scale * (x - shift) be the clean state. Then

    bits per dimension = -(log p(clean state) / n + log(data_scale)) / log 2 + log2(255 / 2)

In expectation over the draws, this is an upper bound on the bits per dimension of a lossless code of the image.
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
    """Likelihood of a batch of images."""

    bits_per_dim: torch.Tensor
    """Bits per dimension of each 8-bit image, (B,), float64. For k > 1 it is an upper bound."""
    log_density: torch.Tensor
    """log p of each clean state in nats, (B,), float64. For k > 1 it is a lower bound."""
    nfe: torch.Tensor
    """Network evaluations of each sample, (B,), int64. Gradient computations are not counted."""


def dequantize(images: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw x uniformly in the bin around each gray level, on the scale on which the levels span [-1, 1].

    `images` has levels in {0..255}, and `uniform` has draws in [0, 1). Both have the shape of the result.
    """
    return (images.to(uniform.dtype) + uniform - 0.5) / 127.5 - 1.0


def estimate(
    denoiser: Denoiser,
    conditioning: Conditioning,
    images: torch.Tensor,
    numbers: Sequence[int],
    seed: int,
    tolerance: float,
) -> Likelihood:
    """Estimate the likelihood of images (B, C, H, W) uint8 under the refiner, given `conditioning`.

    Each image gets one draw for dequantization, one for the probe of the divergence, and for k > 1 one for the
    momentum. The draws depend only on `seed` and on the image's entry in `numbers`. `tolerance` is the tolerated error
    of each integration step, relative and absolute.
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
    """Compute the likelihood of clean states x (B, C, H, W) = data_scale * (image - shift).

    The model must be differentiable in u, so it cannot have classifier guidance.

    Args:
        noise: Standard normal (B, k*C, H, W), needed for k > 1. It draws the components other than the image. Average
            the result over several draws for a better estimate.
        probes: +1 and -1 with equal probability, (B, k*C, H, W). They give an unbiased estimate of the divergence
            (Hutchinson 1989). With None the divergence is exact, at k*C*H*W gradients per evaluation.
        data_scale: Factor on the clean states, above 0.
        t_min: Time at which the flow starts from u = (x, m), in (0, 1). If sqrt(B(t_min)) is below 1e-3, the flow
            starts at sqrt(B) = 1e-3 instead. On the linear clock the default is 1e-5 as in Song et al. On edm, t = 1e-5
            is a noise of 1e-33, and the velocity divides the network's x0 by the noise twice. For every start, the
            result is the density of the model's states at that time.
        tolerance: Tolerated error of each integration step, relative and absolute.

    Raises:
        UserError: The schedule's B is infinite at t = 1.
        ValueError: k > 1 and `noise` is None.
    """
    diffusion, n = model.diffusion, x[0].numel()
    if diffusion.schedule.zero_terminal_snr:
        raise UserError(
            f"likelihood: schedule {type(diffusion.schedule).__name__} has no finite end at t = 1: evaluate a run with "
            "another schedule, such as linear"
        )
    if diffusion.k > 1 and noise is None:
        raise ValueError(f"a process with k = {diffusion.k} needs noise to draw the components other than the image")
    u = diffusion.initial_state(x, noise)
    # the last column integrates the divergence along with u
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
    """Build d/dr of (u, integral of the divergence), flattened to (n, k*C*H*W + 1), with r = sqrt(B)."""
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
    """Return probe^T (df/du) probe, (n,). Its mean over probes is the trace of df/du."""
    (product,) = torch.autograd.grad((f * probe).sum(), u)
    return (product * probe).flatten(1).sum(1)


def _exact_trace(f: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Return the trace of df/du, (n,), with one gradient per element of a sample."""
    trace = u.new_zeros(len(u))
    for i, element in enumerate(f.flatten(1).unbind(1)):
        (gradient,) = torch.autograd.grad(element.sum(), u, retain_graph=True)
        trace = trace + gradient.flatten(1)[:, i]
    return trace


def _log_normal(u: torch.Tensor, S: torch.Tensor) -> torch.Tensor:
    """Return log N(u; 0, S), summed over channels and pixels, (B,), float64."""
    u = u.double().cpu()
    square = (u * apply_matrix(torch.linalg.inv(S), u)).flatten(1).sum(1)
    return -0.5 * (square + u[0].numel() / len(S) * torch.logdet(2.0 * math.pi * S))
