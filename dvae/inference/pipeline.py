"""The public interface of a trained run: generate, reconstruct, interpolate, edit, inpaint, measure likelihood."""

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
    """Encoder, prior and refiner of a run. Images are passed and returned as uint8 (n, C, H, W), on the CPU.

    Image k of a seed always has the same z and the same noise, for every number of images and every batch size. The
    same holds for the noise of the k-th given image.

    If `batch` is None, image k also has the same bits on CPUs of one kind. It is then computed in a fixed, padded chunk
    (see `chunk_ranges`) on one thread. If `batch` is set, it is the number of images per network call. Rounding may
    then change a pixel by one gray level in fp32, and by a few levels in bf16.
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
        """Refine images.

        Args:
            x_hat: (n, C, H, W), uint8 or in [-1, 1].
            z: the latents (n, *latent) that x_hat was decoded from. Required only with denoiser.condition_latent=true.
            seed: seed of the noise; image k uses the noise of image k of the seed.
            label: class of all images, or of each.
            guidance: guidance weights; a number is the weight of x_hat, z and class together.

        Returns the refined images, (n, C, H, W) uint8. Raises UserError if the refiner needs z and it is not given.
        """
        x_hat = (to_float(x_hat) if x_hat.dtype == torch.uint8 else x_hat).to(self.device)
        if z is None and self.models.denoiser.config.condition_latent:
            raise UserError("refine: this refiner needs z besides x_hat (denoiser.condition_latent=true): give both")
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
        """Generate the images first, ..., first + n - 1 of a seed.

        Args:
            n: number of images, 1 or more.
            seed: seed of z and of the noise.
            first: number of the first image, 0 or more.
            label: class of all images, or of each. None samples classes uniformly, if the run has classes.
            sampler: name or config node of a sampler for this call (None: the current one).
            steps: number of sampler steps for this call.
            temperature: scale of the starting noise for this call.
            prior: prior, or name of a prior, for this call.
            guidance: guidance weights; a number is the weight of x_hat, z and class together.
            shared: "z" gives all images z and class of image 0, so only the noise varies. "noise" gives all images the
                noise of image 0, so only z and class vary.
            advance: called with the number of finished images after each batch.

        Returns (VAE samples, refined samples) from the same z, both (n, C, H, W) uint8. The VAE samples are None if
        the run has no encoder or its refiner works in latent space.

        Raises UserError if n < 1 or first < 0, or if the run does not have a requested class, sampler or prior.
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
        """Reconstruct images through the posterior mean.

        Returns (VAE reconstructions, refined reconstructions), both (n, C, H, W) uint8. The latter are None if the
        refiner works in latent space, where there is nothing to refine. Raises UserError if the run has no encoder.
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
        """Interpolate from each image of a to the corresponding image of b.

        Args:
            a: images (n, C, H, W) uint8, or numbers of images of the seed as in `generate`.
            b: the same for the other ends. Of given images, a[i] uses noise number 2 i and b[i] uses 2 i + 1.
            space: "z" interpolates z only, "noise" the noise only, "both" both.
            steps: number of images in a strip, both ends included; at least 2.
            seed: seed of the noise, and of z for images of the seed.
            label: class of all images, or of each.
            guidance: guidance weights.

        Returns strips (n, steps, C, H, W) uint8. See `editing.interpolate` for the paths and the errors.
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
        """Move the z of images along a direction.

        Args:
            images: images (n, C, H, W) uint8, or numbers of images of the seed.
            direction: one of
                - a `Direction`, whose `unit` says what strength 1 means;
                - a vector of the latent's shape, which is multiplied by the strength and added;
                - the number, from 1, of a principal component of the refiner (denoiser.pca_components). This coordinate
                  is set to `strength` standard deviations.
            strength: one strength, or a list of S strengths.
            seed: seed of the noise, and of z for images of the seed.
            label: class of all images, or of each.
            guidance: guidance weights.

        Returns images (n, C, H, W) uint8, or strips (n, S, C, H, W) for a list of strengths.
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
        """Inpaint images: keep the pixels where the mask is true and generate the others.

        `images` is (n, C, H, W) uint8. `mask` is bool, (H, W) for all images or (n, 1, H, W). Returns images
        (n, C, H, W) uint8. See `inpainting.inpaint` in dvae/inference/inpainting.py for the method and the errors.
        """
        images = editing.check_images(self, images)
        masks = mask.expand(len(images), 1, *images.shape[2:])
        return inpainting.inpaint(self, images, masks, seed, range(len(images)), label, guidance).refined

    def bits_per_dim(self, images: torch.Tensor, seed: int, tolerance: float = 1e-4) -> torch.Tensor:
        """Return -log2 p(x | x_hat) per dimension of the refiner alone, without the term of z.

        `images` is (n, C, H, W) uint8; x_hat is the reconstruction of each image. The result is (n,). For each image
        the dequantization, the divergence probe and, if k > 1, the momentum are sampled once. See
        dvae/diffusion/likelihood.py for what the result bounds. Raises UserError if the refiner works in latent space.
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
    """Load the pipeline of a run folder or a bundle on `device` (None: a GPU if there is one, else the CPU).

    Raises UserError if there is no complete bundle, or if the bundle has int8 kernels and `device` is a GPU.
    """
    config, models = bundle.load(bundle.find_bundle(path))
    cpu_only = layer_plan.requires_cpu(models)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() and not cpu_only else "cpu"))
    if cpu_only and device.type != "cpu":
        raise UserError(f"{path} is quantized by method=int8, whose kernels are for CPUs: leave device={device} out")
    for module in models.trained_parts().values():
        module.to(device)
    return Pipeline(config, models, batch)
