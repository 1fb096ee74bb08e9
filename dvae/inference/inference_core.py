"""What every inference function works with: the models of a run, its sampler and prior, and how batches are formed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict

import torch

from dvae.config.schema import ModelConfig
from dvae.data.images import to_float
from dvae.diffusion.conditioning import NO_LABEL, Conditioning
from dvae.errors import UserError, suggest
from dvae.inference.batching import CHUNK_SIZE, batch_rows, single_thread
from dvae.models.components import RunModels, build_sampler
from dvae.registry.priors.base import PRIORS, Prior
from dvae.registry.samplers.base import SAMPLERS
from dvae.utils import rng

ProgressCallback = Callable[[int], None]
"""Called with the number of images that were just finished."""
ClassLabels = int | str | Sequence[int | str] | None
"""The class of all images, or of each: by name or number. None: none is asked for."""


class InferenceCore:
    """The loaded models of a run with the current sampler and prior; encodes, decodes and samples conditioning.

    The functions in refine.py, editing.py and inpainting.py take this object. `dvae.inference.pipeline.Pipeline` adds
    the methods that users call.
    """

    def __init__(self, config: ModelConfig, models: RunModels, batch: int | None = None) -> None:
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
        self.sampler = build_sampler(asdict(SAMPLERS.config(node)) | changes, denoiser.diffusion, denoiser.shapes)

    def use_prior(self, prior: Prior | str) -> None:
        """Draw z from another prior: one that is fitted to the run's latents, or by the name of one that needs no fit.

        Raises UserError for an unknown name, or one that must be fitted.
        """
        if isinstance(prior, str):
            built = PRIORS.build({"name": prior}, self.models.shapes)
            if built.state_dict():
                raise UserError(f"prior={prior} must be fitted to the run's latents: give the fitted one, or normal")
            prior = built
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

    def class_numbers(self, label: ClassLabels, n: int) -> torch.Tensor | None:
        """Class numbers (n,) of n images, -1 where none is given; None where the run has no classes.

        Raises UserError for an unknown class, or another number of them; and where none is given to a refiner that has
        never seen an image without.
        """
        each = [label] * n if label is None or isinstance(label, int | str) else list(label)
        numbers = [self.class_number(one) if isinstance(one, str) else NO_LABEL if one is None else one for one in each]
        count = len(self.config.classes)
        if wrong := [number for number in numbers if not NO_LABEL <= number < count]:
            raise UserError(f"label={wrong[0]}: the run has {count} classes, numbered from 0")
        if len(numbers) != n:
            raise UserError(f"{len(numbers)} labels for {n} images: give one for all, or one for each")
        denoiser = self.models.denoiser.config
        always = denoiser.condition_label and not (denoiser.label_dropout or denoiser.condition_dropout)
        if always and NO_LABEL in numbers:
            raise UserError(
                f"the refiner has seen no image without a class: give label=NAME, of {suggest('', self.config.classes)}"
            )
        return torch.tensor(numbers, device=self.device) if count else None

    def network_batches(self, n: int, size: int) -> Iterator[tuple[torch.Tensor, int]]:
        """Rows of n images, batch by batch, and how many of them count.

        Without a batch size of the user's, every batch has exactly `size` rows; see `batch_rows`.
        """
        return batch_rows(n, self.batch or size, fixed=self.batch is None)

    def reproducible(self) -> AbstractContextManager[None]:
        """Compute on one CPU thread while the block runs, if the bits of an image must not depend on the request."""
        return single_thread(self.batch is None and self.device.type == "cpu")

    @torch.no_grad()
    def sample_conditioning(self, n: int, seed: int, label: ClassLabels = None, first: int = 0) -> Conditioning:
        """Sample what the images first..first + n - 1 are refined from: z from the prior and its x_hat.

        In latent space there is neither. Where the run has classes, label=None draws them evenly.
        """
        return self.conditioning_of(range(first, first + n), seed, label)

    @torch.no_grad()
    def conditioning_of(self, numbers: Sequence[int], seed: int, label: ClassLabels = None) -> Conditioning:
        """Sample what the images of these numbers are refined from; see `sample_conditioning`."""
        shapes = self.models.shapes
        labels = None
        if label is not None:
            labels = self.class_numbers(label, len(numbers))
        elif shapes.labels:
            labels = (rng.uniform(seed, "label", numbers) * shapes.labels).long().to(self.device)
        if self.models.latent_space:
            return Conditioning.unconditional(torch.empty(len(numbers), *shapes.latent, device=self.device), labels)
        component = rng.uniform(seed, "prior component", numbers)
        normal = rng.normal(seed, "prior", numbers, shapes.latent)
        z = self.prior.sample(component.to(self.device), normal.to(self.device))
        return Conditioning(self.decode(z), z, labels)

    @torch.no_grad()
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """x_hat (n, C, H, W) in [-1, 1], fp32, of z (n, *latent)."""
        with self.reproducible():
            z = z.to(self.device)
            batches = self.network_batches(len(z), CHUNK_SIZE)
            return torch.cat([self.models.encoder.decode(z[rows])[:count].float() for rows, count in batches])

    @torch.no_grad()
    def encode(self, images: torch.Tensor, label: ClassLabels = None) -> Conditioning:
        """The posterior mean z of images (n, C, H, W), uint8 or in [-1, 1], and its x_hat; with their class, if any."""
        with self.reproducible():
            x = (to_float(images) if images.dtype == torch.uint8 else images).to(self.device)
            batches = self.network_batches(len(x), CHUNK_SIZE)
            z = torch.cat([self.models.encoder.encode(x[rows]).mean[:count].float() for rows, count in batches])
            return Conditioning(self.decode(z), z, None if label is None else self.class_numbers(label, len(z)))

    def require_pixels(self, task: str) -> None:
        """Raise UserError in latent space."""
        if self.models.latent_space:
            raise UserError(f"{task}: not defined where denoiser.space=latent: use a run whose refiner draws pixels")
