"""Measure the likelihood of many images under a trained run, and write it to a JSON file.

The images are scored chunk by chunk, and an interrupted command can be resumed.

Let x be an image, z its latent and n = C H W. The figures are in bits per dimension of the image:

    bits_per_dim      -log2 p(x | z) / n of the refiner alone (dvae/diffusion/likelihood.py says what it bounds)
    kl_bits_per_dim   KL(q(z | x) || N(0, I)) / (n log 2), the rate term of the VAE's own ELBO
    total_bits_per_dim  with z=draw only: -log2 p(x | z) / n + (log2 q(z | x) - log2 p(z)) / n, p(z) the run's prior

- With z=draw, total_bits_per_dim is one sample of the ELBO of the whole model. Its mean is an upper bound of
  -log2 p(x) / n.
- With z=mean, neither bits_per_dim nor its sum with kl_bits_per_dim is a bound of -log2 p(x) / n.
- The VAE's own reconstruction term is left out. Its variance is arbitrary, so it is not a comparable likelihood.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from dvae.data.images import to_float
from dvae.data.shards.manifest import HELDOUT
from dvae.diffusion import likelihood
from dvae.diffusion.conditioning import NO_LABEL, Conditioning
from dvae.errors import UserError
from dvae.inference.batching import CHUNK_SIZE, chunk_ranges, mean_nfe, single_thread
from dvae.inference.generation.chunks import RECORD_LIMIT, ChunkStore, first_difference, package_versions
from dvae.inference.generation.generation_settings import ImageInputConfig
from dvae.inference.generation.input_images import InputImages, open_input_images
from dvae.inference.pipeline import Pipeline, load
from dvae.inference.prior_fitting import mean_and_error
from dvae.models import bundle
from dvae.registry.encoders.base import Posterior
from dvae.tracking.console import Progress, say
from dvae.utils import atomic_files, rng
from dvae.utils.read import DamagedFile, forbid_extra, read_json


class LatentMode(Enum):
    """Which z of an image is used: x_hat is decoded from it, and the refiner is conditioned on it."""

    mean = "mean"
    """The posterior mean."""
    draw = "draw"
    """One sample of q(z | x), with random numbers that depend on the seed and the image number."""


@dataclass(kw_only=True, slots=True)
class LikelihoodConfig:
    """Settings of tools/likelihood.py."""

    run: str = MISSING
    """A run folder or a bundle."""
    out: str = "likelihood.json"
    """JSON file for the figures of every image and their means."""
    n: int = 64
    """Number of images; the first n are scored."""
    seed: int = 0
    """Seed of the dequantization, the divergence probes, the momentum (if the process has one) and z=draw."""
    images: str = HELDOUT
    """heldout: the run's held-out images; or a folder, zip archive, .npy (n, H, W, C) or image file."""
    resize: bool = False
    """Crop and scale given images to the run's size, and convert them to gray or color like the run's images."""
    z: LatentMode = LatentMode.mean
    """mean | draw: the latent that each image is refined from. draw also gives a bound for the whole model."""
    label: str = ""
    """Class of all images (empty: the class of the held-out image, else none)."""
    tolerance: float = 1e-4
    """Tolerated error of each step of the probability flow, relative and absolute; above 0 and below 1."""
    batch: int | None = None
    """Images per network call (null: 16)."""
    shards: str = ""
    """Folder of the run's shards if they were moved (empty: the folder that the run used)."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import. They register components."""


ConfigStore.instance().store(name="likelihood_schema", node=LikelihoodConfig, provider="dvae")


@forbid_extra
@dataclass(frozen=True)
class MeanWithError:
    """A mean over images and its standard error, as stored in the JSON file."""

    mean: float
    standard_error: float | None


@forbid_extra
@dataclass(frozen=True)
class LikelihoodRecord:
    """The content of the JSON file."""

    request: dict[str, Any]
    means: dict[str, MeanWithError]
    nfe: float
    versions: dict[str, str]
    per_image: dict[str, list[float]]

    def figures(self) -> dict[str, tuple[float, float]]:
        """Return mean and standard error of each figure. The error is NaN if it is undefined, as for one image."""
        return {
            name: (figure.mean, math.nan if figure.standard_error is None else figure.standard_error)
            for name, figure in self.means.items()
        }


@dataclass(frozen=True)
class LikelihoodResult:
    """Result of a finished request."""

    figures: dict[str, tuple[float, float]]
    """Mean over images and its standard error, by name of the figure."""
    nfe: float
    """Mean number of network evaluations per image. Each evaluation also computes a gradient."""
    scored: int
    """Number of images that this command scored. The figures of the others existed before."""
    images_per_second: float
    """Images per second that this command scored. The time to load the run is not counted."""


def score(settings: LikelihoodConfig) -> LikelihoodResult:
    """Score the images and write the figures to `settings.out`.

    If an earlier attempt was stopped, its finished chunks are reused.

    Raises UserError if the settings do not fit the run, or if `out` exists or is unfinished from another request.
    """
    _check(settings)
    pipeline = load(settings.run, settings.batch)
    _check_run(pipeline, settings)
    source = ImageInputConfig(run=settings.run, images=settings.images, resize=settings.resize, shards=settings.shards)
    images, labels = _images(settings, open_input_images(source, pipeline.config))
    pipeline.class_numbers(labels, settings.n)
    out, request = Path(settings.out), _request(settings, images)
    names = score_names(pipeline, settings)
    if out.exists():
        return _existing_result(out, request, names)
    ranges = chunk_ranges(0, settings.n, settings.batch or CHUNK_SIZE)
    with ChunkStore.opened(out, request) as chunks:
        missing = chunks.missing(ranges)
        count, began = sum(map(len, missing)), time.perf_counter()
        with Progress("images", settings.n, settings.n - count) as progress:

            def score_range(numbers: range) -> dict[str, np.ndarray]:
                rows = slice(numbers.start, numbers.stop)
                return score_chunk(pipeline, settings, images[rows], labels[rows], numbers)

            chunks.fill(
                missing, score_range, lambda numbers: progress.update(progress.step + len(numbers), len(numbers))
            )
        seconds = time.perf_counter() - began
        values = {name: np.concatenate([chunks.read(numbers, name) for numbers in ranges]) for name in names}
        record = _record(request, values)
        atomic_files.write_json(out, asdict(record))
        chunks.remove()
    return LikelihoodResult(record.figures(), record.nfe, count, count / seconds if count else 0.0)


def _check_run(pipeline: Pipeline, settings: LikelihoodConfig) -> None:
    """Raise UserError if the likelihood is not defined for this run."""
    pipeline.require_pixels("likelihood")
    if pipeline.models.denoiser.diffusion.schedule.zero_terminal_snr:
        name = pipeline.config.schedule.name
        raise UserError(f"likelihood: schedule={name} has no finite end at t = 1: name a run with another, as linear")
    if settings.z is LatentMode.draw and "encoder" not in pipeline.models.trained_parts():
        raise UserError(f"z=draw: run={settings.run} has no encoder, and so no z: leave it out")


def score_names(pipeline: Pipeline, settings: LikelihoodConfig) -> list[str]:
    """Return the names of the figures that are computed for each image."""
    names = ["bits_per_dim", "nfe"]
    if "encoder" in pipeline.models.trained_parts():
        names += ["kl_nats", "kl_bits_per_dim"]
    return names + (["total_bits_per_dim"] if settings.z is LatentMode.draw else [])


@torch.no_grad()
def score_chunk(
    pipeline: Pipeline, settings: LikelihoodConfig, images: torch.Tensor, labels: list[int | str], numbers: range
) -> dict[str, np.ndarray]:
    """Compute the figures of one chunk of images, in fp32.

    `images` is (n, C, H, W) uint8; `labels` holds their classes; `numbers` are their numbers, which key the random
    numbers. Returns an array (n,) for each name of `score_names`.
    """
    models, seed, dimensions = pipeline.models, settings.seed, images[0].numel()
    with single_thread(settings.batch is None and pipeline.device.type == "cpu"):
        posterior = models.encoder.encode(to_float(images).to(pipeline.device))
        posterior = Posterior(posterior.mean.float(), posterior.logvar.float())
        z = posterior.mean
        if settings.z is LatentMode.draw:
            z = posterior.sample(rng.normal(seed, "posterior", numbers, models.shapes.latent).to(z.device))
        conditioning = Conditioning(pipeline.decode(z), z, pipeline.class_numbers(labels, len(images)))
        found = likelihood.estimate(models.denoiser, conditioning, images, list(numbers), seed, settings.tolerance)
        bits, kl = found.bits_per_dim, posterior.kl().double().cpu()
        values = {
            "bits_per_dim": bits,
            "nfe": found.nfe,
            "kl_nats": kl,
            "kl_bits_per_dim": kl / (dimensions * math.log(2.0)),
        }
        if settings.z is LatentMode.draw:
            rate = log_posterior(posterior, z) - models.prior.log_prob(z).cpu()
            values["total_bits_per_dim"] = bits + rate / (dimensions * math.log(2.0))
    return {name: values[name].numpy() for name in score_names(pipeline, settings)}


def log_posterior(posterior: Posterior, z: torch.Tensor) -> torch.Tensor:
    """Return log q(z | x) in nats, (n,), float64, on the CPU."""
    mean, logvar, z = (part.double().cpu().flatten(1) for part in (posterior.mean, posterior.logvar, z))
    return -0.5 * ((z - mean) ** 2 / logvar.exp() + logvar + math.log(2.0 * math.pi)).sum(1)


def _images(settings: LikelihoodConfig, inputs: InputImages) -> tuple[torch.Tensor, list[int | str]]:
    """Read the first n images, (n, C, H, W) uint8, and their classes. Raises UserError if there are fewer than n."""
    if settings.n > len(inputs):
        raise UserError(f"n={settings.n}: images={settings.images} holds {len(inputs)}: use n={len(inputs)} or less")
    numbers = range(settings.n)
    return inputs.read(numbers), [settings.label or inputs.label(number) or NO_LABEL for number in numbers]


def _request(settings: LikelihoodConfig, images: torch.Tensor) -> dict[str, Any]:
    """Return everything that decides the figures, as JSON values."""
    fields = {name: getattr(settings, name) for name in ("n", "seed", "images", "label", "tolerance", "batch")}
    pixels = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
    return bundle.read_hashes(settings.run) | fields | {"z": settings.z.name, "pixels": pixels}


def _record(request: dict[str, Any], values: dict[str, np.ndarray]) -> LikelihoodRecord:
    means = {}
    for name, per_image in values.items():
        if name != "nfe":
            average, error = mean_and_error(torch.from_numpy(per_image))
            means[name] = MeanWithError(average, None if math.isnan(error) else error)
    return LikelihoodRecord(
        request=request,
        means=means,
        nfe=mean_nfe(int(values["nfe"].sum()), len(values["nfe"])),
        versions=package_versions(),
        per_image={name: array.tolist() for name, array in values.items()},
    )


def _existing_result(out: Path, request: dict[str, Any], names: list[str]) -> LikelihoodResult:
    """Read the existing result of this request, which must hold the figures `names`.

    Raises UserError if `out` holds anything else.
    """
    try:
        record = read_json(out, LikelihoodRecord, RECORD_LIMIT)
    except DamagedFile as error:
        raise UserError(
            f"out={out} is there already, and is not a result of this command ({error.reason}): name another, or "
            "remove it"
        ) from None
    if unlike := first_difference(record.request, request):
        raise UserError(f"out={out} is there already, made with {unlike}: name another, or remove it")
    if record.per_image.keys() != set(names) or record.means.keys() != set(names) - {"nfe"}:
        raise UserError(f"out={out} is there already, with other figures than {', '.join(names)}: remove it")
    ChunkStore.remove_at(out)
    say(f"{out} exists already and matches this request")
    return LikelihoodResult(record.figures(), record.nfe, 0, 0.0)


def _check(settings: LikelihoodConfig) -> None:
    """Raise UserError for settings that are invalid for every run."""
    if settings.n < 1:
        raise UserError(f"n={settings.n}: use 1 or more")
    if settings.batch is not None and settings.batch < 1:
        raise UserError(f"batch={settings.batch}: use 1 or more, or leave it out")
    if not 0.0 < settings.tolerance < 1.0:
        raise UserError(f"tolerance={settings.tolerance:g}: must be above 0 and below 1; 1e-4 is usual")
    if Path(settings.out).suffix != ".json":
        raise UserError(f"out={settings.out}: use a name that ends with .json")
