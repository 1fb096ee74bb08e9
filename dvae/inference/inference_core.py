"""The object that all inference functions take: the models of a run, its sampler, its prior and its batch size."""

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
"""Called with the number of images that have just been finished."""
ClassLabels = int | str | Sequence[int | str] | None
"""The class of all images, or of each image, by name or number. None: no class is requested."""


class InferenceCore:
    """Hold the models of a run with the current sampler and prior, and encode, decode and sample conditioning.

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
        """Counted network evaluations per image of the latest call, averaged over images."""
        # taken from a buffer, because a quantized model may have no parameters
        self.device = models.denoiser.data_scale.device

    def use_sampler(self, sampler: object = None, **changes: object) -> None:
        """Use another sampler for refinement, or change fields of the current sampler.

        Args:
            sampler: name or config node of a sampler. None, or a dict of fields without a name, keeps the current one.
            changes: fields of the sampler to change.

        Raises UserError if a name or a field is unknown, or if the sampler cannot integrate the run's process.
        """
        if isinstance(sampler, dict) and "name" not in sampler:
            changes, sampler = sampler | changes, None
        node = {"name": sampler} if isinstance(sampler, str) else self.sampler.config if sampler is None else sampler
        denoiser = self.models.denoiser
        self.sampler = build_sampler(asdict(SAMPLERS.config(node)) | changes, denoiser.diffusion, denoiser.shapes)

    def use_prior(self, prior: Prior | str) -> None:
        """Sample z from another prior.

        `prior` is a prior that was fitted to the run's latents, or the name of a prior without fitted parameters.

        Raises UserError if the name is unknown or belongs to a prior that must be fitted.
        """
        if isinstance(prior, str):
            built = PRIORS.build({"name": prior}, self.models.shapes)
            if built.state_dict():
                raise UserError(f"prior={prior} must be fitted to the run's latents: give the fitted one, or normal")
            prior = built
        self.prior = prior.to(self.device).eval()

    @contextmanager
    def using(self, sampler: object = None, *, prior: Prior | str | None = None, **changes: object) -> Iterator[None]:
        """Use another sampler, changed fields or another prior while the block runs.

        The arguments are those of `use_sampler` and `use_prior`. Fields that are None stay unchanged.
        """
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
        """Return the number of a class. Raises UserError, with the nearest name, if the run has no such class."""
        if name not in self.config.classes:
            known = suggest(name, self.config.classes) if self.config.classes else "this run has no classes"
            raise UserError(f"label={name}: {known}")
        return self.config.classes.index(name)

    def class_numbers(self, label: ClassLabels, n: int) -> torch.Tensor | None:
        """Return the class numbers (n,) of n images, -1 for no class; None if the run has no classes.

        Raises UserError if a class is unknown, if the number of labels is not n, or if a class is missing and the
        refiner was never trained without a class.
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
                f"the refiner was not trained without a class: give label=NAME, {suggest('', self.config.classes)}"
            )
        return torch.tensor(numbers, device=self.device) if count else None

    def network_batches(self, n: int, size: int) -> Iterator[tuple[torch.Tensor, int]]:
        """Split n images into batches: yield the rows of a batch and the number of rows that are not padding.

        If the user gave no batch size, every batch has exactly `size` rows; see `batch_rows`.
        """
        return batch_rows(n, self.batch or size, fixed=self.batch is None)

    def reproducible(self) -> AbstractContextManager[None]:
        """Compute on one CPU thread while the block runs, if fixed chunks are used on a CPU.

        Then the bits of an image do not depend on the number of threads.
        """
        return single_thread(self.batch is None and self.device.type == "cpu")

    @torch.no_grad()
    def sample_conditioning(self, n: int, seed: int, label: ClassLabels = None, first: int = 0) -> Conditioning:
        """Sample z from the prior and decode x_hat, for the images first, ..., first + n - 1 of the seed.

        In latent space there is no z and no x_hat. If the run has classes, label=None samples them uniformly.
        """
        return self.conditioning_of(range(first, first + n), seed, label)

    @torch.no_grad()
    def conditioning_of(self, numbers: Sequence[int], seed: int, label: ClassLabels = None) -> Conditioning:
        """Sample z and decode x_hat for the images with these numbers; see `sample_conditioning`."""
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
        """Decode z (n, *latent) to x_hat (n, C, H, W) in [-1, 1], fp32."""
        with self.reproducible():
            z = z.to(self.device)
            batches = self.network_batches(len(z), CHUNK_SIZE)
            return torch.cat([self.models.encoder.decode(z[rows])[:count].float() for rows, count in batches])

    @torch.no_grad()
    def encode(self, images: torch.Tensor, label: ClassLabels = None) -> Conditioning:
        """Encode images (n, C, H, W), uint8 or in [-1, 1].

        Returns the posterior mean z, the x_hat that it decodes to, and the class if `label` is given.
        """
        with self.reproducible():
            x = (to_float(images) if images.dtype == torch.uint8 else images).to(self.device)
            batches = self.network_batches(len(x), CHUNK_SIZE)
            z = torch.cat([self.models.encoder.encode(x[rows]).mean[:count].float() for rows, count in batches])
            return Conditioning(self.decode(z), z, None if label is None else self.class_numbers(label, len(z)))

    def require_pixels(self, task: str) -> None:
        """Raise UserError if the refiner works in latent space. `task` is named in the message."""
        if self.models.latent_space:
            raise UserError(f"{task}: not defined for denoiser.space=latent: use a run whose refiner draws pixels")
