"""The latents of a trained run: posteriors of images into a file, and priors fitted to them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING
from safetensors.torch import save_file

from dvae.config.schema import ModelConfig
from dvae.data.images import to_float
from dvae.data.shards.manifest import HELDOUT, TRAIN
from dvae.data.shards.reader import Shards
from dvae.errors import UserError, suggest
from dvae.inference import pipeline as pipelines
from dvae.inference.batching import CHUNK
from dvae.inference.generation.generation_settings import GivenConfig
from dvae.inference.generation.input_images import open_inputs
from dvae.inference.pipeline import Pipeline
from dvae.inference.run_images import open_split
from dvae.models import bundle, bundle_export
from dvae.models.components import Models
from dvae.registry.encoders.base import Posterior
from dvae.registry.priors.base import PRIORS, Prior
from dvae.tracking.console import Progress
from dvae.utils import atomic_files, rng

SUFFIXES = (".npz", ".safetensors")
SPLITS = (TRAIN, HELDOUT)
NO_VALUE = -1
"""Number of an attribute that an image lacks."""


@dataclass(kw_only=True, slots=True)
class LatentsConfig:
    """What tools/latents.py takes."""

    run: str = MISSING
    """A run folder or a bundle."""
    out: str = ""
    """File of the latents that is written, NAME.npz or NAME.safetensors (empty: none)."""
    split: str = TRAIN
    """Images of the run whose latents are written: train or heldout."""
    images: str = ""
    """Images in their place: a folder, zip archive, .npy (n, H, W, C) or image file (empty: those of the split)."""
    resize: bool = False
    """Crop and scale these to the run's size, and make them gray or color as its are."""
    n: int | None = None
    """The first so many images (null: all)."""
    bundle: str = ""
    """Folder of a bundle that is written: the run's, with another prior, fitted (empty: none)."""
    seed: int | None = None
    """Seed of the fit (null: the one that the run's own prior stage has)."""
    shards: str = ""
    """Folder of the run's shards, where they have been moved (empty: where the run had them)."""
    batch: int = 64
    """Images per network call."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import, which register components."""
    prior: Any = None
    """Prior that is fitted to the latents of the training images."""


ConfigStore.instance().store(name="latents_schema", node=LatentsConfig, provider="dvae")


class Images(Protocol):
    def __len__(self) -> int: ...

    def read(self, numbers: list[int], /) -> torch.Tensor:
        """Images (n, C, H, W), uint8."""
        ...


@dataclass(frozen=True)
class Compared:
    """What a prior gives held-out latents, in nats per dimension: mean over images, and its standard error."""

    name: str
    draws: tuple[float, float]
    """Of one draw z ~ q(z | x) of each image: what the refiner was trained on."""
    means: tuple[float, float]
    """Of the posteriors' means."""


@dataclass(frozen=True)
class Fitted:
    figures: dict[str, float]
    """Of the fit, as the prior gives them."""
    images: int
    """Training images whose latents were fitted."""
    heldout: int
    """Held-out images that the priors were compared on."""
    table: list[Compared]
    """The new prior, the run's own, N(0, I)."""


def run(settings: LatentsConfig) -> tuple[int, Fitted | None]:
    """Do what the words ask for: (latents written, what became of the fit). Raises UserError where it cannot be."""
    _check(settings)
    pipeline = pipelines.load(settings.run, settings.batch)
    models = pipeline.models
    if math.prod(models.io.latent) == 0:
        raise UserError(f"run={settings.run} has no encoder, and so no latents: name a run with one")
    if settings.prior is not None and models.latent_space:
        raise UserError(
            f"prior={_name(settings.prior)}: run={settings.run} draws latents by diffusion (denoiser.space=latent), "
            "no prior has a part in it: leave out prior= and bundle="
        )
    written = extract(settings, pipeline) if settings.out else 0
    return written, fit(settings, pipeline) if settings.bundle else None


def extract(settings: LatentsConfig, pipeline: Pipeline) -> int:
    """Write the latents to `settings.out`, complete or absent; returns how many there are.

    Tensors mean and logvar (n, *latent) float32, in the order of the images; label.NAME (n,) int64 for each attribute
    of the shards' images; and, as JSON, what they are of: the array `about` of an .npz, metadata of a .safetensors.
    """
    shards = None if settings.images else open_split(settings.run, pipeline.config, settings.split, settings.shards)
    given = GivenConfig(run=settings.run, images=settings.images, resize=settings.resize)
    images: Images = open_inputs(given, pipeline.config) if shards is None else shards
    count = len(images) if settings.n is None else settings.n
    if not 0 < count <= len(images):
        raise UserError(f"n={settings.n}: there are {len(images)} images: use 1 to {len(images)}")
    posterior = encode(pipeline, images, count, "latents")
    tensors, values = {"mean": posterior.mean, "logvar": posterior.logvar}, {}
    if shards is not None:
        values = {name: [str(value) for value in known] for name, known in shards.labels.items()}
        tensors |= {f"label.{name}": codes for name, codes in label_codes(shards, count, values).items()}
    about = {
        "weights": bundle.read_hashes(settings.run)["weights"],
        "images": settings.images or settings.split,
        "labels": values,
    }
    write(Path(settings.out), tensors, about)
    return count


@torch.no_grad()
def encode(pipeline: Pipeline, images: Images, count: int, what: str) -> Posterior:
    """Posteriors of the first `count` images, in fp32, on the CPU."""
    means, logvars = [], []
    with Progress(what, count) as progress:
        for indices in torch.arange(count).split(pipeline.batch or CHUNK):
            x = to_float(images.read(indices.tolist())).to(pipeline.device, memory_format=torch.channels_last)
            posterior = pipeline.models.encoder.encode(x)
            means.append(posterior.mean.float().cpu())
            logvars.append(posterior.logvar.float().cpu())
            progress.update(progress.step + len(indices), len(indices))
    return Posterior(torch.cat(means), torch.cat(logvars))


def label_codes(shards: Shards, count: int, values: dict[str, list[str]]) -> dict[str, torch.Tensor]:
    """For each attribute the number, among its values, of that of each image; -1 where it has none."""
    codes = {name: torch.full((count,), NO_VALUE) for name in values}
    numbers = {name: {value: number for number, value in enumerate(known)} for name, known in values.items()}
    for row, index in enumerate(shards.substituted(np.arange(count)) if values else []):
        labels = shards.info(int(index))["labels"]
        for name, known in numbers.items():
            codes[name][row] = known.get(str(labels.get(name)), NO_VALUE)
    return codes


def write(out: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Complete or absent; the form is that of the name."""
    text = json.dumps(about, ensure_ascii=False, sort_keys=True)
    held = {name: value.contiguous() for name, value in tensors.items()}
    if out.suffix == ".npz":
        arrays: dict[str, Any] = {name: value.numpy() for name, value in held.items()}
        atomic_files.write_file(out, lambda aside: np.savez(aside, about=np.array(text), **arrays))
    else:
        atomic_files.write_file(out, lambda aside: save_file(held, aside, {"about": text}))


def fit(settings: LatentsConfig, pipeline: Pipeline) -> Fitted:
    """Fit the prior to the latents of all training images, compare it on the held-out ones, and write the bundle."""
    models, config = pipeline.models, pipeline.config
    prior_config = PRIORS.config(settings.prior)
    prior = PRIORS.build(prior_config, models.io).to(pipeline.device)
    posteriors = []
    for split in (TRAIN, HELDOUT):
        shards = open_split(settings.run, config, split, settings.shards)
        posteriors.append(encode(pipeline, shards, len(shards), split))
    training, heldout = posteriors
    seed = rng.child(config.seed, "prior") % 2**31 if settings.seed is None else settings.seed
    figures = prior.fit(training.mean, training.logvar, seed)
    named: list[tuple[str, Prior]] = [
        (prior_config.name, prior),
        (f"{config.prior.name} (the run's)", models.prior),
        ("N(0, I)", PRIORS.build({"name": "normal"}, models.io)),
    ]
    table = list(compare(named, heldout, seed))
    write_bundle(settings, config, models, prior_config, prior)
    return Fitted(figures, len(training.mean), len(heldout.mean), table)


def compare(named: list[tuple[str, Prior]], heldout: Posterior, seed: int) -> Iterator[Compared]:
    """What each prior gives the same latents."""
    noise = rng.normal(seed, "held-out draw", range(len(heldout.mean)), tuple(heldout.mean.shape[1:]))
    draws, dimensions = heldout.sample(noise), heldout.mean[0].numel()
    for name, prior in named:
        device = next(iter([*prior.parameters(), *prior.buffers()]), draws).device
        figures = [mean_and_error(prior.log_prob(z.to(device)).cpu() / dimensions) for z in (draws, heldout.mean)]
        yield Compared(name, *figures)


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Mean of values (n,), and its standard error (nan for one value)."""
    error = values.double().std() / math.sqrt(len(values)) if len(values) > 1 else torch.tensor(math.nan)
    return float(values.double().mean()), float(error)


def write_bundle(settings: LatentsConfig, config: ModelConfig, models: Models, prior_config: Any, prior: Prior) -> None:
    """The run's bundle with another prior, in `settings.bundle`."""
    parts = {name: part.state_dict() for name, part in models.trained_parts().items() if name != "prior"}
    if prior.state_dict():
        parts["prior"] = prior.state_dict()
    bundle_export.export(Path(settings.bundle), replace(config, prior=prior_config), parts)


def _name(prior: Any) -> str:
    return str(prior["name"] if isinstance(prior, dict) else prior.name)


def _check(settings: LatentsConfig) -> None:
    """Raise UserError for words that are wrong whatever the run."""
    out, target = settings.out, settings.bundle
    if not out and not target:
        raise UserError("nothing would be written: add out=NAME.npz, or prior=flow bundle=FOLDER")
    if out and Path(out).suffix not in SUFFIXES:
        raise UserError(f"out={out}: use a name that ends with {' or '.join(SUFFIXES)}")
    if settings.split not in SPLITS:
        raise UserError(f"split={settings.split}: {suggest(settings.split, SPLITS)}")
    if bool(target) != (settings.prior is not None):
        lacking = "bundle=FOLDER, where it is written" if not target else "prior=NAME, which is fitted: gmm or flow"
        raise UserError(f"a prior and a bundle go together: add {lacking}")
    for word, place in (("out", out), ("bundle", target)):
        if place and Path(place).exists():
            raise UserError(f"{word}={place} is there already: name another, or remove it")
    if settings.batch < 1:
        raise UserError(f"batch={settings.batch}: use 1 or more")
