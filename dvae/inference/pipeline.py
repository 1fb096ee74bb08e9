"""A trained run for its user: generate, reconstruct, interpolate, edit, inpaint, measure likelihood."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from dvae.config.schema import ModelConfig
from dvae.data.images import to_float, to_uint8
from dvae.diffusion import likelihood
from dvae.diffusion.conditioning import NO_LABEL, Conditioning
from dvae.diffusion.guidance import Guidance
from dvae.errors import UserError, suggest
from dvae.inference import editing, inpainting
from dvae.inference.batching import CHUNK, GeneratedImages, batch_rows, calls, mean, one_thread
from dvae.inference.directions import Direction
from dvae.inference.editing import Images
from dvae.inference.noise import Between, Noise, Shared, named
from dvae.inference.refine import check_drawing, refine_batch
from dvae.models import bundle
from dvae.models.components import Models, build_sampler
from dvae.models.quantization import layer_plan
from dvae.registry.priors.base import PRIORS, Prior
from dvae.registry.samplers.base import SAMPLERS
from dvae.utils import rng

Advance = Callable[[int], None]
Classes = int | str | Sequence[int | str] | None
"""The class of all images, or of each: by name or number. None: none is asked for."""
PLAIN = Guidance()


class Pipeline:
    """Encoder, prior and refiner of a run. Images go in and out as uint8 (n, C, H, W), on the CPU.

    Image k of a seed has the same z and the same noise however many are asked for and in whatever batches; so has image
    k of those that are given. On a CPU of one kind it has the same bits too, as long as `batch` is None: it is then
    computed in a fixed chunk (see `calls`), filled up where images are lacking, on one thread. With a `batch` of images
    per network call rounding may move a pixel by one gray level in fp32, and by a few in bf16.
    """

    def __init__(self, config: ModelConfig, models: Models, batch: int | None = None) -> None:
        self.config = config
        self.models = models
        self.batch = batch
        self.sampler = models.sampler
        self.prior = models.prior
        self.nfe: float = 0
        """Network evaluations per image of the latest call, as counted; their mean where images differ."""
        self.device = models.denoiser.data_scale.device  # quantized layers have no parameters

    def use_sampler(self, sampler: object = None, **changes: object) -> None:
        """Refine with another sampler, by its name or config node, or (None, or a dict of fields without a name) the
        present one; with fields changed.

        Raises UserError for an unknown name or field, and for a sampler that does not integrate the run's process.
        """
        if isinstance(sampler, dict) and "name" not in sampler:
            changes, sampler = sampler | changes, None
        node = {"name": sampler} if isinstance(sampler, str) else self.sampler.config if sampler is None else sampler
        denoiser = self.models.denoiser
        self.sampler = build_sampler(asdict(SAMPLERS.config(node)) | changes, denoiser.diffusion, denoiser.io)

    def use_prior(self, prior: Prior | str) -> None:
        """Draw z from another prior: one that is fitted to the run's latents, or by the name of one that needs no fit.

        Raises UserError for an unknown name, or one that must be fitted.
        """
        if isinstance(prior, str):
            made = PRIORS.build({"name": prior}, self.models.io)
            if made.state_dict():
                raise UserError(f"prior={prior} must be fitted to the run's latents: give the fitted one, or normal")
            prior = made
        self.prior = prior.to(self.device).eval()

    @contextmanager
    def using(self, sampler: object = None, *, prior: Prior | str | None = None, **changes: object) -> Iterator[None]:
        """Another sampler, with fields changed, and another prior while the block runs, as `use_sampler` and
        `use_prior` have it. Fields that are None stay as they are."""
        before = self.sampler, self.prior
        changes = {name: value for name, value in changes.items() if value is not None}
        try:
            if sampler is not None or changes:
                self.use_sampler(sampler, **changes)
            if prior is not None:
                self.use_prior(prior)
            yield
        finally:
            self.sampler, self.prior = before

    def class_number(self, name: str) -> int:
        """The number of a class. Raises UserError, with the nearest name, where the run has none of that name."""
        if name not in self.config.classes:
            known = suggest(name, self.config.classes) if self.config.classes else "this run has no classes"
            raise UserError(f"label={name}: {known}")
        return self.config.classes.index(name)

    def classes(self, label: Classes, n: int) -> torch.Tensor | None:
        """Class numbers (n,) of n images, -1 where none is given; None where the run has no classes.

        Raises UserError for an unknown class, or another number of them; and where none is given to a refiner that has
        never seen an image without.
        """
        each = [label] * n if label is None or isinstance(label, int | str) else list(label)
        numbers = [self.class_number(one) if isinstance(one, str) else NO_LABEL if one is None else one for one in each]
        known = len(self.config.classes)
        if wrong := [number for number in numbers if not NO_LABEL <= number < known]:
            raise UserError(f"label={wrong[0]}: the run has {known} classes, numbered from 0")
        if len(numbers) != n:
            raise UserError(f"{len(numbers)} labels for {n} images: give one for all, or one for each")
        denoiser = self.models.denoiser.config
        always = denoiser.condition_label and not (denoiser.label_dropout or denoiser.condition_dropout)
        if always and NO_LABEL in numbers:
            raise UserError(
                f"the refiner has seen no image without a class: give label=NAME, of {suggest('', self.config.classes)}"
            )
        return torch.tensor(numbers, device=self.device) if known else None

    def _rows(self, n: int, size: int) -> Iterator[tuple[torch.Tensor, int]]:
        """Rows of n images, call by call, and how many of them count: fixed calls of `size` without a batch size."""
        return batch_rows(n, self.batch or size, fixed=self.batch is None)

    def _same_bits(self) -> AbstractContextManager[None]:
        return one_thread(self.batch is None and self.device.type == "cpu")

    @torch.no_grad()
    def draw(self, n: int, seed: int, label: Classes = None, first: int = 0) -> Conditioning:
        """What the images first..first + n - 1 are refined from: z from the prior and its x_hat, in latent space
        nothing.

        And their class where the run has classes (None: drawn evenly).
        """
        return self.drawn_for(range(first, first + n), seed, label)

    @torch.no_grad()
    def drawn_for(self, numbers: Sequence[int], seed: int, label: Classes = None) -> Conditioning:
        """What the images of these numbers are refined from; see `draw`."""
        io = self.models.io
        labels = None
        if label is not None:
            labels = self.classes(label, len(numbers))
        elif io.labels:
            labels = (rng.uniform(seed, "label", numbers) * io.labels).long().to(self.device)
        if self.models.latent_space:
            return Conditioning.nothing(torch.empty(len(numbers), *io.latent, device=self.device), labels)
        component = rng.uniform(seed, "prior component", numbers)
        normal = rng.normal(seed, "prior", numbers, io.latent)
        z = self.prior.sample(component.to(self.device), normal.to(self.device))
        return Conditioning(self.decode(z), z, labels)

    @torch.no_grad()
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """x_hat (n, C, H, W) in [-1, 1], fp32, of z (n, *latent)."""
        with self._same_bits():
            z = z.to(self.device)
            return torch.cat(
                [self.models.encoder.decode(z[rows])[:count].float() for rows, count in self._rows(len(z), CHUNK)]
            )

    @torch.no_grad()
    def encode(self, images: torch.Tensor, label: Classes = None) -> Conditioning:
        """The posterior mean z of images (n, C, H, W), uint8 or in [-1, 1], and its x_hat; with their class, if any."""
        with self._same_bits():
            x = (to_float(images) if images.dtype == torch.uint8 else images).to(self.device)
            parts = [
                self.models.encoder.encode(x[rows]).mean[:count].float() for rows, count in self._rows(len(x), CHUNK)
            ]
            z = torch.cat(parts)
            return Conditioning(self.decode(z), z, None if label is None else self.classes(label, len(z)))

    def refine(
        self,
        x_hat: torch.Tensor,
        z: torch.Tensor | None = None,
        seed: int = 0,
        *,
        label: Classes = None,
        guidance: Guidance | float = PLAIN,
    ) -> torch.Tensor:
        """Refined images (n, C, H, W) uint8 of x_hat (n, C, H, W), uint8 or in [-1, 1]; each has its noise of the seed.

        z (n, *latent) is what x_hat was decoded from; only a refiner that is given it (denoiser.condition_latent) needs
        it. Raises UserError where it lacks.
        """
        x_hat = (to_float(x_hat) if x_hat.dtype == torch.uint8 else x_hat).to(self.device)
        if z is None and self.models.denoiser.config.condition_latent:
            raise UserError("refine: this refiner is given z besides x_hat (denoiser.condition_latent=true): give both")
        z = x_hat.new_zeros(len(x_hat), 0) if z is None else z.to(self.device)
        conditioning = Conditioning(x_hat, z, self.classes(label, len(x_hat)))
        return to_uint8(self.refined(conditioning, Noise(seed, range(len(z))), guidance=guidance)[0])

    @torch.no_grad()
    def refined(
        self,
        conditioning: Conditioning,
        noise: Noise,
        *,
        guidance: Guidance | float = PLAIN,
        advance: Advance | None = None,
        known: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Refined images (n, C, H, W), fp32, in [-1, 1] as far as the sampler keeps them there, and their network
        evaluations (n,); both on the CPU.

        `known` = (images in [-1, 1], mask (n, 1, H, W)) keeps the pixels where the mask is true.
        """
        # with steps of its own an image may be alone in a call, so it always is
        size = CHUNK if self.sampler.lockstep else 1
        images, evaluations = [], []
        with self._same_bits():
            for rows, count in self._rows(len(noise), size):
                kept = None if known is None else (known[0][rows], known[1][rows])
                refined, nfe, _ = refine_batch(self, conditioning[rows], noise[rows.tolist()], guidance, kept)
                images.append(refined[:count].cpu())
                evaluations.append(nfe[:count].cpu())
                if advance:
                    advance(count)
        nfe = torch.cat(evaluations)
        self.nfe = mean(int(nfe.sum()), len(nfe))
        return torch.cat(images), nfe

    @torch.no_grad()
    def generate_batch(
        self,
        numbers: range,
        seed: int,
        *,
        label: Classes = None,
        guidance: Guidance | float = PLAIN,
        shared: Shared | None = None,
        intermediate: int = 0,
    ) -> GeneratedImages:
        """The images of these numbers, in one network call per evaluation; on one thread where that fixes their bits.

        `numbers` is one of `calls`; a label for each is that of numbers[0], numbers[1], ...
        """
        check_drawing(self, shared, intermediate)
        same = [0] * len(numbers)
        with self._same_bits():
            conditioning = self.drawn_for(same if shared is Shared.z else numbers, seed, label)
            noise = Noise(seed, same if shared is Shared.noise else numbers)
            refined, nfe, estimates = refine_batch(self, conditioning, noise, guidance, estimates=intermediate)
            vae = to_uint8(conditioning.x_hat).cpu() if self.models.has_generator else None
            on_the_way = torch.stack([to_uint8(each).cpu() for each in estimates], 1) if estimates else None
            classes = None if conditioning.label is None else conditioning.label.cpu()
            return GeneratedImages(vae, to_uint8(refined).cpu(), nfe.cpu(), classes, on_the_way)

    def generate(
        self,
        n: int,
        seed: int,
        *,
        first: int = 0,
        label: Classes = None,
        sampler: object = None,
        steps: int | None = None,
        temperature: float | None = None,
        prior: Prior | str | None = None,
        guidance: Guidance | float = PLAIN,
        shared: Shared | str | None = None,
        advance: Advance | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(VAE samples, refined samples) from the same z, both (n, C, H, W) uint8: images first..first + n - 1 of the
        seed.

        The former are None where nothing is drawn before refinement: without an encoder, and in latent space.
        `sampler`, `steps`, `temperature` and `prior` are for this call alone; `shared="z"` lets only the noise vary,
        `shared="noise"` only z. Raises UserError for n < 1 or first < 0, and for what the run has not.
        """
        if n < 1 or first < 0:
            raise UserError(f"n={n} first={first}: use n=1 or more, and first=0 or more")
        each = None if label is None or isinstance(label, int | str) else list(label)
        if each is not None:
            self.classes(each, n)
        same = None if shared is None else named(Shared, shared, "shared")
        refined, vae, evaluations = [], [], 0
        with self.using(sampler, prior=prior, steps=steps, temperature=temperature):
            for numbers in calls(first, n, self.batch):
                asked = slice(max(first - numbers.start, 0), first + n - numbers.start)
                mine = label if each is None else [each[min(max(k - first, 0), n - 1)] for k in numbers]
                drawn = self.generate_batch(numbers, seed, label=mine, guidance=guidance, shared=same)
                refined.append(drawn.refined[asked])
                if drawn.vae is not None:
                    vae.append(drawn.vae[asked])
                evaluations += int(drawn.nfe[asked].sum())
                if advance:
                    advance(len(refined[-1]))
        self.nfe = mean(evaluations, n)
        return torch.cat(vae) if vae else None, torch.cat(refined)

    def reconstruct(
        self, images: torch.Tensor, seed: int = 0, *, label: Classes = None, guidance: Guidance | float = PLAIN
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(VAE reconstructions, refined reconstructions) through the posterior mean, both (n, C, H, W) uint8.

        The latter are None in latent space, where there is nothing to refine. Raises UserError without an encoder.
        """
        start = editing.start(self, images, seed, label)
        drawn = editing.reconstruct(self, start, seed, guidance)
        return (drawn.refined, None) if drawn.vae is None else (drawn.vae, drawn.refined)

    def interpolate(
        self,
        a: Images,
        b: Images,
        space: Between | str = Between.both,
        steps: int = 8,
        seed: int = 0,
        *,
        label: Classes = None,
        guidance: Guidance | float = PLAIN,
    ) -> torch.Tensor:
        """Strips (n, steps, C, H, W) uint8 from each of a to that of b, both ends included.

        a and b are images, of which a[i] has the noise 2 i and b[i] that of 2 i + 1, as the images a[0], b[0], a[1],
        ... have it together; or they are numbers of images of the seed, as `generate` draws them. space "z": only z is
        interpolated, "noise": only the noise, "both". See editing.py for the paths; raises UserError as it says.
        """
        pair = editing.pair(self, a, b, seed, label)
        drawn = editing.interpolate(self, *pair, named(Between, space, "space"), steps, seed, guidance)
        return drawn.refined.unflatten(0, (-1, steps))

    def edit(
        self,
        images: Images,
        direction: Direction | torch.Tensor | int,
        strength: float | Sequence[float],
        seed: int = 0,
        *,
        label: Classes = None,
        guidance: Guidance | float = PLAIN,
    ) -> torch.Tensor:
        """Images (n, C, H, W) uint8 whose z is moved along a direction; for a list of S strengths strips
        (n, S, C, H, W).

        `images`: images, or numbers of images of the seed. `direction`: a Direction, which says what
        strength 1 is, a vector of the latent's shape, which is added once, or the number, from 1, of a principal
        component that the refiner knows (denoiser.pca_components): it is put at `strength` standard deviations.
        """
        strengths = [float(strength)] if isinstance(strength, int | float) else [float(each) for each in strength]
        move = editing.along(self, direction)
        drawn = editing.edit(self, editing.start(self, images, seed, label), move, strengths, seed, guidance)
        return drawn.refined if isinstance(strength, int | float) else drawn.refined.unflatten(0, (-1, len(strengths)))

    def inpaint(
        self,
        images: torch.Tensor,
        mask: torch.Tensor,
        seed: int = 0,
        *,
        label: Classes = None,
        guidance: Guidance | float = PLAIN,
    ) -> torch.Tensor:
        """Images (n, C, H, W) uint8 whose pixels are kept where mask is true, and drawn anew elsewhere.

        `mask`: bool (H, W) for all, or (n, 1, H, W). See dvae/inference/inpainting.py; raises UserError as it says.
        """
        images = editing.checked(self, images)
        masks = mask.expand(len(images), 1, *images.shape[2:])
        return inpainting.inpaint(self, images, masks, seed, range(len(images)), label, guidance).refined

    def need_pixels(self, what: str) -> None:
        """Raise UserError in latent space."""
        if self.models.latent_space:
            raise UserError(f"{what}: not defined where denoiser.space=latent: use a run whose refiner draws pixels")

    def bits_per_dim(self, images: torch.Tensor, seed: int, tolerance: float = 1e-4) -> torch.Tensor:
        """-log2 p(x given x_hat) per dimension of images (n, C, H, W) uint8, (n,): of the refiner alone, without z.

        x_hat is the reconstruction of the image itself. One draw of dequantization, of the momentum where k > 1, and of
        the probe of the divergence per image; see diffusion/likelihood.py for what that bounds. Raises UserError in
        latent space.
        """
        self.need_pixels("bits per dimension")
        parts = []
        for numbers in torch.arange(len(images)).split(self.batch or CHUNK):
            chosen = images[numbers]
            conditioning = self.encode(to_float(chosen).to(self.device))
            found = likelihood.of_images(self.models.denoiser, conditioning, chosen, numbers.tolist(), seed, tolerance)
            parts.append(found.bits_per_dim)
        return torch.cat(parts)


def load(path: str | Path, batch: int | None = None, device: str | torch.device | None = None) -> Pipeline:
    """The pipeline of a run folder or a bundle, on `device` (None: a GPU where there is one).

    Raises UserError where there is none or it is not whole, or its int8 kernels are asked onto a GPU.
    """
    config, models = bundle.load(bundle.find_bundle(path))
    bound = layer_plan.requires_cpu(models)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() and not bound else "cpu"))
    if bound and device.type != "cpu":
        raise UserError(f"{path} is quantized by method=int8, whose kernels are for CPUs: leave device={device} out")
    for module in models.trained_parts().values():
        module.to(device)
    return Pipeline(config, models, batch)
