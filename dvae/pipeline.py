"""A trained run for its user: generate and reconstruct."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dvae import bundle, keyed
from dvae.config import RunConfig
from dvae.data.images import to_float, to_uint8
from dvae.denoiser import Given
from dvae.errors import UserError
from dvae.models import Models, build_sampler

Advance = Callable[[int], None]


class Pipeline:
    """Encoder, prior and refiner of a run. Images go in and out as uint8 (n, C, H, W), on the CPU.

    Image k of a seed has the same z and the same noise however many are asked for and in whatever batches.
    """

    def __init__(self, config: RunConfig, models: Models, batch: int = 64) -> None:
        self.config = config
        self.models = models
        self.batch = batch
        self.sampler = models.sampler
        self.nfe = 0
        """Network evaluations per image of the latest refinement, as counted."""
        self.device = next(models.encoder.parameters()).device

    def use_sampler(self, node: object) -> None:
        """Refine with another sampler: a config node or its fields with `name`."""
        self.sampler = build_sampler(node, self.models.denoiser.diffusion, self.models.io)

    @torch.no_grad()
    def draw_latents(self, n: int, seed: int) -> torch.Tensor:
        """z (n, *latent) from the prior."""
        numbers = range(n)
        uniform = keyed.uniform(seed, "prior component", numbers)
        normal = keyed.normal(seed, "prior", numbers, self.models.io.latent)
        return self.models.prior.sample(uniform.to(self.device), normal.to(self.device))

    @torch.no_grad()
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """x_hat (n, C, H, W) in [-1, 1], fp32."""
        return torch.cat([self.models.encoder.decode(part).float() for part in z.split(self.batch)])

    @torch.no_grad()
    def refine(
        self,
        given: Given,
        seed: int,
        *,
        guidance: float = 0.0,
        numbers: Sequence[int] | None = None,
        advance: Advance | None = None,
    ) -> torch.Tensor:
        """Refined images (n, C, H, W), uint8. `numbers` names each image's noise (default 0..n-1)."""
        images = list(range(len(given.z))) if numbers is None else list(numbers)
        parts = []
        for start in range(0, len(images), self.batch):
            chosen = slice(start, start + self.batch)
            parts.append(self._refine(Given(given.x_hat[chosen], given.z[chosen]), images[chosen], seed, guidance))
            if advance:
                advance(len(parts[-1]))
        return torch.cat(parts)

    def _refine(self, given: Given, numbers: list[int], seed: int, guidance: float) -> torch.Tensor:
        denoiser = self.models.denoiser
        io = self.models.io
        shape = (io.k * io.channels, io.image_size, io.image_size)

        def noise(step: int) -> torch.Tensor:
            drawn = keyed.normal(seed, f"sampler {step}", numbers, shape)
            return drawn.to(self.device, memory_format=torch.channels_last)

        given = Given(given.x_hat.contiguous(memory_format=torch.channels_last), given.z)
        start = denoiser.diffusion.prior(
            keyed.normal(seed, "x_T", numbers, shape).to(self.device, memory_format=torch.channels_last)
        )
        bf16 = self.config.train_refiner.precision.name == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            sampled = self.sampler.sample(denoiser.bind(given, guidance), start, noise)
        self.nfe = sampled.nfe
        return to_uint8(denoiser.to_image(sampled.u[:, : io.channels], given))

    def generate(
        self, n: int, seed: int, *, guidance: float = 0.0, advance: Advance | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(VAE samples, refined samples) from the same z, both (n, C, H, W) uint8."""
        z = self.draw_latents(n, seed)
        x_hat = self.decode(z)
        return to_uint8(x_hat), self.refine(Given(x_hat, z), seed, guidance=guidance, advance=advance)

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """(VAE reconstructions, refined reconstructions) through the posterior mean, both (n, C, H, W) uint8."""
        x = to_float(images).to(self.device)
        z = torch.cat([self.models.encoder.encode(part).mean.float() for part in x.split(self.batch)])
        x_hat = self.decode(z)
        return to_uint8(x_hat), self.refine(Given(x_hat, z), seed)


def load(path: str | Path) -> Pipeline:
    """The pipeline of a run folder or a bundle. Raises UserError where there is none or it is not whole."""
    folder = Path(path)
    inner = folder / "bundle"
    if inner.is_dir():
        folder = inner
    elif not folder.is_dir():
        raise UserError(f"{folder}: no such run or bundle")
    return Pipeline(*bundle.load(folder))
