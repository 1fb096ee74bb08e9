"""Implement tools/latents.py: export the posteriors of images to a file, and fit a prior to a run's posteriors."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING
from safetensors.torch import save_file

from dvae.data.shards.manifest import HELDOUT, TRAIN
from dvae.data.shards.reader import Shards
from dvae.errors import UserError, suggest
from dvae.inference.encode_posteriors import ImageReader, encode_posteriors
from dvae.inference.generation.generation_settings import ImageInputConfig
from dvae.inference.generation.input_images import open_input_images
from dvae.inference.pipeline import Pipeline, load
from dvae.inference.prior_fitting import PriorFit, fit_prior
from dvae.inference.run_images import open_split
from dvae.models import bundle
from dvae.utils import atomic_files

SUFFIXES = (".npz", ".safetensors")
SPLITS = (TRAIN, HELDOUT)
MISSING_LABEL = -1
"""Code of an attribute that an image does not have."""


@dataclass(kw_only=True, slots=True)
class LatentsConfig:
    """Settings of tools/latents.py."""

    run: str = MISSING
    """A run folder or a bundle."""
    out: str = ""
    """File to write the latents to, NAME.npz or NAME.safetensors (empty: none)."""
    split: str = TRAIN
    """Images of the run whose latents are written: train or heldout."""
    images: str = ""
    """Images to use instead of the split: a folder, zip archive, .npy (n, H, W, C) or image file (empty: the split)."""
    resize: bool = False
    """Crop and scale `images` to the run's size, and convert them to gray or color like the run's images."""
    n: int | None = None
    """Number of images; the first n are used (null: all)."""
    bundle: str = ""
    """Folder to write a bundle to: the run's bundle with the newly fitted prior (empty: none)."""
    seed: int | None = None
    """Seed of the fit (null: the seed of the run's own prior stage)."""
    shards: str = ""
    """Folder of the run's shards if they were moved (empty: the folder that the run used)."""
    batch: int = 64
    """Images per network call."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import. They register components."""
    prior: Any = None
    """Prior to fit to the latents of the training images; needs `bundle`."""


ConfigStore.instance().store(name="latents_schema", node=LatentsConfig, provider="dvae")


def run(settings: LatentsConfig) -> tuple[int, PriorFit | None]:
    """Export latents, fit a prior, or both.

    Returns the number of latents written (0 without `out`) and the fit (None without `bundle`). Raises UserError if the
    settings are invalid, or if the run has no encoder or, for a prior, draws latents by diffusion.
    """
    _check(settings)
    pipeline = load(settings.run, settings.batch)
    models = pipeline.models
    if math.prod(models.shapes.latent) == 0:
        raise UserError(f"run={settings.run} has no encoder, and so no latents: name a run with one")
    if settings.prior is not None and models.latent_space:
        raise UserError(
            f"prior={_prior_name(settings.prior)}: run={settings.run} draws latents by diffusion "
            "(denoiser.space=latent), without a prior: leave out prior= and bundle="
        )
    written = export_latents(settings, pipeline) if settings.out else 0
    if not settings.bundle:
        return written, None
    folder = Path(settings.bundle)
    fit = fit_prior(pipeline, settings.prior, folder, run=settings.run, shards=settings.shards, seed=settings.seed)
    return written, fit


def export_latents(settings: LatentsConfig, pipeline: Pipeline) -> int:
    """Write the latents to `settings.out` and return their number. The file is complete or absent.

    The file holds, in the order of the images:
    - mean and logvar, (n, *latent) float32;
    - label.NAME, (n,) int64, for each attribute of the shards' images; -1 if an image does not have the attribute;
    - about: JSON with the hash of the weights, the images, and the values of each attribute. It is an array of an
      .npz and metadata of a .safetensors.

    Raises UserError if there are not n images.
    """
    shards = None if settings.images else open_split(settings.run, pipeline.config, settings.split, settings.shards)
    source = ImageInputConfig(run=settings.run, images=settings.images, resize=settings.resize)
    images: ImageReader = open_input_images(source, pipeline.config) if shards is None else shards
    count = len(images) if settings.n is None else settings.n
    if not 0 < count <= len(images):
        raise UserError(f"n={settings.n}: there are {len(images)} images: use 1 to {len(images)}")
    posterior = encode_posteriors(pipeline, images, count, "latents")
    tensors, values = {"mean": posterior.mean, "logvar": posterior.logvar}, {}
    if shards is not None:
        values = {name: [str(value) for value in known] for name, known in shards.labels.items()}
        tensors |= {f"label.{name}": codes for name, codes in label_codes(shards, count, values).items()}
    about = {
        "weights": bundle.read_hashes(settings.run)["weights"],
        "images": settings.images or settings.split,
        "labels": values,
    }
    write_latents(Path(settings.out), tensors, about)
    return count


def label_codes(shards: Shards, count: int, values: dict[str, list[str]]) -> dict[str, torch.Tensor]:
    """Return the codes (count,) int64 of each attribute: the index of an image's value in `values`, or -1 for none."""
    codes = {name: torch.full((count,), MISSING_LABEL) for name in values}
    numbers = {name: {value: number for number, value in enumerate(known)} for name, known in values.items()}
    for row, index in enumerate(shards.substituted(np.arange(count)) if values else []):
        labels = shards.info(int(index))["labels"]
        for name, known in numbers.items():
            codes[name][row] = known.get(str(labels.get(name)), MISSING_LABEL)
    return codes


def write_latents(out: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Write latents to an .npz or a .safetensors, by the name of `out`. The file is complete or absent."""
    text = json.dumps(about, ensure_ascii=False, sort_keys=True)
    held = {name: value.contiguous() for name, value in tensors.items()}
    if out.suffix == ".npz":
        arrays: dict[str, Any] = {name: value.numpy() for name, value in held.items()}
        atomic_files.write_file(out, lambda aside: np.savez(aside, about=np.array(text), **arrays))
    else:
        atomic_files.write_file(out, lambda aside: save_file(held, aside, {"about": text}))


def _prior_name(prior: Any) -> str:
    return str(prior["name"] if isinstance(prior, dict) else prior.name)


def _check(settings: LatentsConfig) -> None:
    """Raise UserError for settings that are invalid for every run."""
    out, target = settings.out, settings.bundle
    if not out and not target:
        raise UserError("nothing would be written: add out=NAME.npz, or prior=flow bundle=FOLDER")
    if out and Path(out).suffix not in SUFFIXES:
        raise UserError(f"out={out}: use a name that ends with {' or '.join(SUFFIXES)}")
    if settings.split not in SPLITS:
        raise UserError(f"split={settings.split}: {suggest(settings.split, SPLITS)}")
    if bool(target) != (settings.prior is not None):
        lacking = "bundle=FOLDER, the folder to write" if not target else "prior=NAME, the prior to fit: gmm or flow"
        raise UserError(f"a prior and a bundle go together: add {lacking}")
    for setting, place in (("out", out), ("bundle", target)):
        if place and Path(place).exists():
            raise UserError(f"{setting}={place} is there already: name another, or remove it")
    if settings.batch < 1:
        raise UserError(f"batch={settings.batch}: use 1 or more")
