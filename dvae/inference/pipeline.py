"""A trained run for its user: generate, reconstruct, interpolate, edit, inpaint, measure likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from dvae.data.images import to_float, to_uint8
from dvae.diffusion import likelihood
from dvae.diffusion.conditioning import Conditioning
from dvae.diffusion.guidance import Guidance
from dvae.errors import UserError
from dvae.inference import editing, inpainting
from dvae.inference.batching import CHUNK_SIZE, chunk_ranges, mean_nfe
from dvae.inference.directions import Direction
from dvae.inference.editing import ImageInput
from dvae.inference.inference_core import ClassLabels, InferenceCore, ProgressCallback
from dvae.inference.noise import InterpolationSpace, KeyedNoise, SharedVariable, parse_enum
from dvae.inference.refine import UNGUIDED, generate_batch, refine_images
from dvae.models import bundle
from dvae.models.quantization import layer_plan
from dvae.registry.priors.base import Prior


class Pipeline(InferenceCore):
    """Encoder, prior and refiner of a run. Images go in and out as uint8 (n, C, H, W), on the CPU.

    Image k of a seed has the same z and the same noise however many are asked for and in whatever batches; so has image
    k of those that are given. On a CPU of one kind it has the same bits too, as long as `batch` is None: it is then
    computed in a fixed chunk (see `chunk_ranges`), filled up where images are lacking, on one thread. With a `batch` of
    images per network call rounding may move a pixel by one gray level in fp32, and by a few in bf16.
    """

    def refine(
        self,
        x_hat: torch.Tensor,
        z: torch.Tensor | None = None,
        seed: int = 0,
        *,
        label: ClassLabels = None,
        guidance: Guidance | float = UNGUIDED,
    ) -> torch.Tensor:
        """Refined images (n, C, H, W) uint8 of x_hat (n, C, H, W), uint8 or in [-1, 1]; each has its noise of the seed.

        z (n, *latent) is what x_hat was decoded from; only a refiner that is given it (denoiser.condition_latent) needs
        it. Raises UserError where it lacks.
        """
        x_hat = (to_float(x_hat) if x_hat.dtype == torch.uint8 else x_hat).to(self.device)
        if z is None and self.models.denoiser.config.condition_latent:
            raise UserError("refine: this refiner is given z besides x_hat (denoiser.condition_latent=true): give both")
        z = x_hat.new_zeros(len(x_hat), 0) if z is None else z.to(self.device)
        conditioning = Conditioning(x_hat, z, self.class_numbers(label, len(x_hat)))
        return to_uint8(refine_images(self, conditioning, KeyedNoise(seed, range(len(z))), guidance=guidance)[0])

    def generate(
        self,
        n: int,
        seed: int,
        *,
        first: int = 0,
        label: ClassLabels = None,
        sampler: object = None,
        steps: int | None = None,
        temperature: float | None = None,
        prior: Prior | str | None = None,
        guidance: Guidance | float = UNGUIDED,
        shared: SharedVariable | str | None = None,
        advance: ProgressCallback | None = None,
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
            self.class_numbers(each, n)
        variable = None if shared is None else parse_enum(SharedVariable, shared, "shared")
        refined, vae, evaluations = [], [], 0
        with self.using(sampler, prior=prior, steps=steps, temperature=temperature):
            for numbers in chunk_ranges(first, n, self.batch):
                requested = slice(max(first - numbers.start, 0), first + n - numbers.start)
                labels = label if each is None else [each[min(max(k - first, 0), n - 1)] for k in numbers]
                images = generate_batch(self, numbers, seed, label=labels, guidance=guidance, shared=variable)
                refined.append(images.refined[requested])
                if images.vae is not None:
                    vae.append(images.vae[requested])
                evaluations += int(images.nfe[requested].sum())
                if advance:
                    advance(len(refined[-1]))
        self.nfe = mean_nfe(evaluations, n)
        return torch.cat(vae) if vae else None, torch.cat(refined)

    def reconstruct(
        self, images: torch.Tensor, seed: int = 0, *, label: ClassLabels = None, guidance: Guidance | float = UNGUIDED
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(VAE reconstructions, refined reconstructions) through the posterior mean, both (n, C, H, W) uint8.

        The latter are None in latent space, where there is nothing to refine. Raises UserError without an encoder.
        """
        source = editing.source_images(self, images, seed, label)
        generated = editing.reconstruct(self, source, seed, guidance)
        return (generated.refined, None) if generated.vae is None else (generated.vae, generated.refined)

    def interpolate(
        self,
        a: ImageInput,
        b: ImageInput,
        space: InterpolationSpace | str = InterpolationSpace.both,
        steps: int = 8,
        seed: int = 0,
        *,
        label: ClassLabels = None,
        guidance: Guidance | float = UNGUIDED,
    ) -> torch.Tensor:
        """Strips (n, steps, C, H, W) uint8 from each of a to that of b, both ends included.

        a and b are images, of which a[i] has the noise 2 i and b[i] that of 2 i + 1, as the images a[0], b[0], a[1],
        ... have it together; or they are numbers of images of the seed, as `generate` draws them. space "z": only z is
        interpolated, "noise": only the noise, "both". See editing.py for the paths; raises UserError as it says.
        """
        sources = editing.source_pairs(self, a, b, seed, label)
        space = parse_enum(InterpolationSpace, space, "space")
        generated = editing.interpolate(self, *sources, space, steps, seed, guidance)
        return generated.refined.unflatten(0, (-1, steps))

    def edit(
        self,
        images: ImageInput,
        direction: Direction | torch.Tensor | int,
        strength: float | Sequence[float],
        seed: int = 0,
        *,
        label: ClassLabels = None,
        guidance: Guidance | float = UNGUIDED,
    ) -> torch.Tensor:
        """Images (n, C, H, W) uint8 whose z is moved along a direction; for a list of S strengths strips
        (n, S, C, H, W).

        `images`: images, or numbers of images of the seed. `direction`: a Direction, which says what
        strength 1 is, a vector of the latent's shape, which is added once, or the number, from 1, of a principal
        component that the refiner knows (denoiser.pca_components): it is put at `strength` standard deviations.
        """
        strengths = [float(strength)] if isinstance(strength, int | float) else [float(each) for each in strength]
        latent_edit = editing.latent_edit(self, direction)
        source = editing.source_images(self, images, seed, label)
        refined = editing.edit(self, source, latent_edit, strengths, seed, guidance).refined
        return refined if isinstance(strength, int | float) else refined.unflatten(0, (-1, len(strengths)))

    def inpaint(
        self,
        images: torch.Tensor,
        mask: torch.Tensor,
        seed: int = 0,
        *,
        label: ClassLabels = None,
        guidance: Guidance | float = UNGUIDED,
    ) -> torch.Tensor:
        """Images (n, C, H, W) uint8 whose pixels are kept where mask is true, and drawn anew elsewhere.

        `mask`: bool (H, W) for all, or (n, 1, H, W). See dvae/inference/inpainting.py; raises UserError as it says.
        """
        images = editing.check_images(self, images)
        masks = mask.expand(len(images), 1, *images.shape[2:])
        return inpainting.inpaint(self, images, masks, seed, range(len(images)), label, guidance).refined

    def bits_per_dim(self, images: torch.Tensor, seed: int, tolerance: float = 1e-4) -> torch.Tensor:
        """-log2 p(x given x_hat) per dimension of images (n, C, H, W) uint8, (n,): of the refiner alone, without z.

        x_hat is the reconstruction of the image itself. One draw of dequantization, of the momentum where k > 1, and of
        the probe of the divergence per image; see diffusion/likelihood.py for what that bounds. Raises UserError in
        latent space.
        """
        self.require_pixels("bits per dimension")
        parts = []
        for numbers in torch.arange(len(images)).split(self.batch or CHUNK_SIZE):
            x = images[numbers]
            conditioning = self.encode(to_float(x).to(self.device))
            found = likelihood.estimate(self.models.denoiser, conditioning, x, numbers.tolist(), seed, tolerance)
            parts.append(found.bits_per_dim)
        return torch.cat(parts)


def load(path: str | Path, batch: int | None = None, device: str | torch.device | None = None) -> Pipeline:
    """The pipeline of a run folder or a bundle, on `device` (None: a GPU where there is one).

    Raises UserError where there is none or it is not whole, or its int8 kernels are asked onto a GPU.
    """
    config, models = bundle.load(bundle.find_bundle(path))
    cpu_only = layer_plan.requires_cpu(models)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() and not cpu_only else "cpu"))
    if cpu_only and device.type != "cpu":
        raise UserError(f"{path} is quantized by method=int8, whose kernels are for CPUs: leave device={device} out")
    for module in models.trained_parts().values():
        module.to(device)
    return Pipeline(config, models, batch)
