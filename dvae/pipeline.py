"""A trained run for its user: generate, reconstruct, inpaint, measure likelihood."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dvae import bundle, keyed, likelihood
from dvae.data.images import to_float, to_uint8
from dvae.denoiser import Given
from dvae.errors import UserError, near
from dvae.guidance import Bound, Guidance
from dvae.inpainting import keep_known
from dvae.models import Models, build_sampler
from dvae.registry import SAMPLERS
from dvae.registry.samplers import OnStep
from dvae.settings import RunConfig

Advance = Callable[[int], None]
PLAIN = Guidance()
IMPUTATIONS = 8
"""Rounds in which unknown pixels are filled in by the encoder before an image is inpainted."""
CHUNK = 16
"""Images that are computed together where no batch size is asked for: most of the speed of larger batches (80% of that
of 64 on one core, with the demo's networks), and at most 15 images are drawn that nobody asked for."""


@dataclass(frozen=True)
class Drawn:
    """Images that were drawn together."""

    vae: torch.Tensor | None
    """What they were refined from, (n, C, H, W) uint8; None where nothing is drawn before refinement."""
    refined: torch.Tensor
    """(n, C, H, W) uint8."""
    nfe: torch.Tensor
    """Network evaluations of each, (n,), int64, as counted."""


def calls(first: int, n: int, batch: int | None) -> list[range]:
    """The numbers that are drawn together, call by call, for the images first..first + n - 1.

    Without `batch` these are whole chunks [16 c, 16 c + 16): what is asked for besides never changes what an image is
    computed with, so it has the same bits. With `batch` they are so many at a time, and no others.
    """
    end = first + n
    if batch is None:
        return [range(start, start + CHUNK) for start in range(first - first % CHUNK, end, CHUNK)]
    return [range(start, min(start + batch, end)) for start in range(first, end, batch)]


class Pipeline:
    """Encoder, prior and refiner of a run. Images go in and out as uint8 (n, C, H, W), on the CPU.

    Image k of a seed has the same z and the same noise however many are asked for and in whatever batches. `generate`
    gives it the same bits, on a CPU of one kind, as long as `batch` is None: it is then computed in a fixed chunk (see
    `calls`) on one thread. With a `batch` of images per network call rounding may move a pixel by one grey level in
    fp32, and by a few in bf16.
    """

    def __init__(self, config: RunConfig, models: Models, batch: int | None = None) -> None:
        self.config = config
        self.models = models
        self.batch = batch
        self.sampler = models.sampler
        self.nfe: float = 0
        """Network evaluations per image of the latest refinement, as counted; their mean where images differ."""
        self.device = next(models.denoiser.parameters()).device

    @property
    def _together(self) -> int:
        """Images per network call where images are given, not drawn."""
        return self.batch or CHUNK

    def use_sampler(self, sampler: object = None, **changes: object) -> None:
        """Refine with another sampler, by its name or config node, or (None) the present one; with fields changed.

        Raises UserError for an unknown name or field, and for a sampler that does not integrate the run's process.
        """
        node = {"name": sampler} if isinstance(sampler, str) else self.sampler.config if sampler is None else sampler
        denoiser = self.models.denoiser
        self.sampler = build_sampler(asdict(SAMPLERS.config(node)) | changes, denoiser.diffusion, denoiser.io)

    def class_number(self, name: str) -> int:
        """The number of a class. Raises UserError, with the nearest name, where the run has none of that name."""
        if name not in self.config.classes:
            known = near(name, self.config.classes) if self.config.classes else "this run has no classes"
            raise UserError(f"label={name}: {known}")
        return self.config.classes.index(name)

    @torch.no_grad()
    def draw(self, n: int, seed: int, label: int | None = None, first: int = 0) -> Given:
        """What the images first..first + n - 1 are refined from: z from the prior and its x_hat, in latent space
        nothing.

        And their class where the run has classes (None: drawn evenly).
        """
        numbers, io = range(first, first + n), self.models.io
        labels = None
        if io.labels:
            drawn = (keyed.uniform(seed, "label", numbers) * io.labels).long()
            labels = (drawn if label is None else torch.full((n,), label)).to(self.device)
        if self.models.latent_space:
            return Given.nothing(torch.empty(n, *io.latent, device=self.device), labels)
        component = keyed.uniform(seed, "prior component", numbers)
        normal = keyed.normal(seed, "prior", numbers, io.latent)
        z = self.models.prior.sample(component.to(self.device), normal.to(self.device))
        return Given(self.decode(z), z, labels)

    @torch.no_grad()
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """x_hat (n, C, H, W) in [-1, 1], fp32."""
        return torch.cat([self.models.encoder.decode(part).float() for part in z.split(self._together)])

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> Given:
        """The posterior mean of images x (n, C, H, W) in [-1, 1], and its x_hat."""
        z = torch.cat([self.models.encoder.encode(part).mean.float() for part in x.split(self._together)])
        return Given(self.decode(z), z)

    @torch.no_grad()
    def refine(
        self,
        given: Given,
        seed: int,
        *,
        guidance: Guidance = PLAIN,
        numbers: Sequence[int] | None = None,
        advance: Advance | None = None,
        known: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Refined images (n, C, H, W), fp32, in [-1, 1] as far as the sampler keeps them there.

        `numbers` names each image's noise (default 0..n-1). `known` = (images in [-1, 1], mask (n, 1, H, W)) keeps the
        pixels where the mask is true.
        """
        images = list(range(len(given.z))) if numbers is None else list(numbers)
        parts, evaluations = [], 0
        for start in range(0, len(images), self._together):
            chosen = slice(start, start + self._together)
            kept = None if known is None else (known[0][chosen], known[1][chosen])
            refined, nfe = self._refine(given[chosen], images[chosen], seed, guidance, kept)
            parts.append(refined.cpu())
            evaluations += int(nfe.sum())
            if advance:
                advance(len(refined))
        self.nfe = mean(evaluations, len(images))
        return torch.cat(parts)

    def _refine(
        self,
        given: Given,
        numbers: list[int],
        seed: int,
        guidance: Guidance,
        known: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(images, network evaluations of each) of one batch."""
        denoiser, io = self.models.denoiser, self.models.denoiser.io
        shape = (io.k * io.channels, io.image_size, io.image_size)

        def normal(purpose: str) -> torch.Tensor:
            drawn = keyed.normal(seed, purpose, numbers, shape)
            return drawn.to(self.device, memory_format=torch.channels_last)

        given = Given(given.x_hat.contiguous(memory_format=torch.channels_last), given.z, given.label)
        on_step: OnStep | None = None
        if known is not None:
            x, mask = (part.to(self.device) for part in known)
            on_step = keep_known(
                denoiser.diffusion, denoiser.to_state(x, given), mask, lambda i: normal(f"known pixels {i}")
            )
        model = Bound(denoiser, given, guidance, self.models.classifier)
        bf16 = self.config.train_refiner.precision.name == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            start = denoiser.diffusion.prior(normal("x_T"))
            sampled = self.sampler.sample(model, start, lambda i: normal(f"sampler {i}"), on_step)
        drawn = denoiser.to_image(sampled.u[:, : io.channels], given)
        return self.decode(drawn) if self.models.latent_space else drawn, sampled.nfe

    def draw_together(
        self, numbers: range, seed: int, *, label: int | None = None, guidance: Guidance = PLAIN
    ) -> Drawn:
        """The images of these numbers, in one network call per evaluation; on one thread where that fixes their bits.

        `numbers` is one of `calls`.
        """
        with one_thread(self.batch is None and self.device.type == "cpu"):
            given = self.draw(len(numbers), seed, label, numbers.start)
            refined, nfe = self._refine(given, list(numbers), seed, guidance, None)
            vae = to_uint8(given.x_hat).cpu() if self.models.generates else None
            return Drawn(vae, to_uint8(refined).cpu(), nfe.cpu())

    def generate(
        self,
        n: int,
        seed: int,
        *,
        first: int = 0,
        label: int | None = None,
        guidance: Guidance = PLAIN,
        advance: Advance | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(VAE samples, refined samples) from the same z, both (n, C, H, W) uint8: images first..first + n - 1 of the
        seed.

        The former are None where nothing is drawn before refinement: without an encoder, and in latent space. Raises
        UserError for n < 1 or first < 0.
        """
        if n < 1 or first < 0:
            raise UserError(f"n={n} first={first}: use n=1 or more, and first=0 or more")
        refined, vae, evaluations = [], [], 0
        for numbers in calls(first, n, self.batch):
            drawn = self.draw_together(numbers, seed, label=label, guidance=guidance)
            asked = slice(max(first - numbers.start, 0), first + n - numbers.start)
            refined.append(drawn.refined[asked])
            if drawn.vae is not None:
                vae.append(drawn.vae[asked])
            evaluations += int(drawn.nfe[asked].sum())
            if advance:
                advance(len(refined[-1]))
        self.nfe = mean(evaluations, n)
        return torch.cat(vae) if vae else None, torch.cat(refined)

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(VAE reconstructions, refined reconstructions) through the posterior mean, both (n, C, H, W) uint8.

        The latter are None in latent space, where there is nothing to refine.
        """
        given = self.encode(to_float(images).to(self.device))
        refined = None if self.models.latent_space else to_uint8(self.refine(given, seed))
        return to_uint8(given.x_hat).cpu(), refined

    @torch.no_grad()
    def inpaint(
        self, images: torch.Tensor, mask: torch.Tensor, seed: int, *, guidance: Guidance = PLAIN
    ) -> torch.Tensor:
        """Images (n, C, H, W) uint8 whose pixels are kept where mask (n, 1, H, W) is true, and drawn anew elsewhere.

        x_hat is found by imputation: unknown pixels are grey at first, then those of the reconstruction, a few times
        over (Rezende et al. 2014, appendix F). Raises UserError for a sampler whose images stand at no
        common time, and in latent space, where pixels cannot be kept.
        """
        self._need_pixels("inpainting")
        if not self.sampler.by_steps:
            raise UserError(
                "inpainting needs a sampler that moves all images in the same steps: use sampler=ddim or em"
            )
        known = to_float(images).to(self.device)
        mask = mask.to(self.device)
        filled = torch.where(mask, known, 0.0)
        for _ in range(IMPUTATIONS):
            given = self.encode(filled)
            filled = torch.where(mask, known, given.x_hat)
        drawn = self.refine(given, seed, guidance=guidance, known=(known, mask))
        return torch.where(mask.cpu(), images, to_uint8(drawn))

    def _need_pixels(self, what: str) -> None:
        """Raise UserError in latent space."""
        if self.models.latent_space:
            raise UserError(f"{what}: not defined where denoiser.space=latent: use a run whose refiner draws pixels")

    def bits_per_dim(self, images: torch.Tensor, seed: int, tolerance: float = 1e-4) -> torch.Tensor:
        """-log2 p(x given x_hat) per dimension of images (n, C, H, W) uint8, (n,): of the refiner alone, without z.

        x_hat is the reconstruction of the image itself. One draw of dequantisation, of the momentum where k > 1, and of
        the probe of the divergence per image; see dvae/likelihood.py for what that bounds. Raises UserError in latent
        space.
        """
        self._need_pixels("bits per dimension")
        denoiser, io = self.models.denoiser, self.models.denoiser.io
        shape = (io.k * io.channels, io.image_size, io.image_size)
        parts = []
        for numbers in torch.arange(len(images)).split(self._together):
            chosen = images[numbers]
            x = likelihood.dequantised(
                chosen, keyed.uniform(seed, "dequantise", numbers.tolist(), images.shape[1:]).float()
            )
            probes = keyed.uniform(seed, "probe", numbers.tolist(), shape).sub(0.5).sign().float()
            momentum = keyed.normal(seed, "momentum", numbers.tolist(), shape)
            given = self.encode(to_float(chosen).to(self.device))
            found = likelihood.bits_per_dim(
                Bound(denoiser, given),
                denoiser.to_state(x.to(self.device), given),
                noise=momentum.to(self.device),
                probes=probes.to(self.device),
                data_scale=float(denoiser.data_scale),
                tolerance=tolerance,
            )
            parts.append(found.bits_per_dim)
        return torch.cat(parts)


@contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """Compute on one thread of the CPU while the block runs, if `wanted`: with more, the number of threads decides how
    sums are split, and so their rounding."""
    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def mean(evaluations: int, images: int) -> float:
    """Evaluations per image, a whole number where it is one."""
    return evaluations // images if evaluations % images == 0 else evaluations / images


def bundle_of(path: str | Path) -> Path:
    """The bundle of a run folder, or the bundle itself. Raises UserError where there is none."""
    folder = Path(path)
    inner = folder / "bundle"
    if inner.is_dir():
        return inner
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run or bundle")
    return folder


def load(path: str | Path, batch: int | None = None, device: str | torch.device | None = None) -> Pipeline:
    """The pipeline of a run folder or a bundle, on `device` (None: a GPU where there is one).

    Raises UserError where there is none or it is not whole.
    """
    config, models = bundle.load(bundle_of(path))
    for module in models.trained().values():
        module.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Pipeline(config, models, batch)
