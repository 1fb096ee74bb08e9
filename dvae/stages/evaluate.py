"""The stage evaluate: generate sets of images, save pictures of them, and score the sets."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from dvae.config.compose import uses_stream
from dvae.config.model_config import model_config
from dvae.config.schema import RunConfig
from dvae.data.images import to_float, to_uint8
from dvae.data.shards.reader import Shards
from dvae.inference.pipeline import Pipeline
from dvae.registry.stages.base import STAGES, StageConfig
from dvae.runs.folder import Run
from dvae.stages.base import Stage
from dvae.stages.image_scores import score_images
from dvae.stages.run_models import BUNDLE_PARTS, load_models
from dvae.toy2d.evaluate_points import evaluate_points
from dvae.tracking import figures, pictures
from dvae.tracking.console import Progress
from dvae.tracking.tracker import Tracker
from dvae.training.batches import open_shards
from dvae.utils import atomic_files
from dvae.utils.evenly_spaced import evenly_spaced

PICTURE_IMAGES = 32
"""Maximum number of images in each picture."""

ImageSets = dict[str, list[torch.Tensor]]
"""Generated images by the name of the set, "vae" or "refined": one tensor (n, C, H, W), uint8, per seed.

"vae" exists only if the encoder generates images."""


@STAGES.register("evaluate")
class EvaluateStage(Stage):
    """Generates sets of images, saves pictures, and scores the sets. It is repeated if its settings change."""

    @dataclass(kw_only=True, slots=True)
    class Config(StageConfig):
        """The stage evaluate adds no settings."""

    after = ("prior", "refiner", "classifier")
    own_job = True
    takes_streams = True

    def is_current(self, record: dict[str, Any]) -> bool:
        return bool(record.get("settings") == settings_fingerprint(self.config))

    def run(self, run: Run) -> None:
        config = self.config
        if not run.has_weights("classifier"):
            config = replace(config, classifier=None)  # not trained yet; the evaluation works without it
        models = load_models(run, config, *BUNDLE_PARTS)
        for module in models.trained_parts().values():
            module.eval().requires_grad_(False)
        stages = run.records()
        began = time.perf_counter()
        pipeline = Pipeline(model_config(config), models, config.evaluate.batch)
        if uses_stream(config):
            evaluation = evaluate_points(run, config, pipeline)
        else:
            evaluation = evaluate_images(
                run, config, pipeline, open_shards(config, "train"), open_shards(config, "heldout")
            )
        record = {"seconds": time.perf_counter() - began, "settings": settings_fingerprint(config)}
        scores = figures.evaluation_figures(evaluation)
        summary = {
            "recipe": config.recipe,
            "stages": stages | {self.name: record},
            "evaluation": evaluation,
            "figures": figures.training_figures(run.path) | scores,
        }
        with Tracker(run.path, config.tracking.wandb, self.name) as tracker:
            tracker.summarize(scores)
            paths = [path for path in (run.path / "samples.png", run.path / "reconstructions.png") if path.exists()]
            tracker.results(scores, paths, run.bundle)
        atomic_files.write_json(run.summary, summary)
        run.finish(self.name, record)


def settings_fingerprint(config: RunConfig) -> str:
    """Return a text that changes if any setting changes on which the evaluation depends."""
    return f"{replace(config.evaluate, every_steps=0)} {config.sampler}"


def evaluate_images(run: Run, config: RunConfig, pipeline: Pipeline, train: Shards, heldout: Shards) -> dict[str, Any]:
    """Save pictures of reconstructions and samples, and score them. Returns the entry of summary.json."""
    sampler: Any = OmegaConf.to_container(OmegaConf.structured(config.sampler), enum_to_str=True)
    entry: dict[str, Any] = {"sampler": sampler}
    x_hat = None
    if "encoder" in pipeline.models.trained_parts():
        save_reconstruction_pictures(run, pipeline, heldout)
        images = heldout.read(evenly_spaced(len(heldout), config.evaluate.n))
        x_hat = to_uint8(pipeline.encode(to_float(images).to(pipeline.device)).x_hat).cpu()
        entry["reconstructions"] = {
            "n": len(images),
            "psnr": float(psnr(images, x_hat).mean()),
            "latent": list(pipeline.models.shapes.latent),
        }
    sets, speed = generate_sets(config, pipeline)
    save_sample_pictures(run, sets)
    entry |= {"nfe": pipeline.nfe, "refined_images_per_second": speed}
    if not config.evaluate.metrics:
        return entry
    return entry | score_images(
        run, config, sets, config.evaluate.seeds, train, heldout, pipeline.nfe, sampler, reconstructions=x_hat
    )


def psnr(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the peak signal-to-noise ratio of images against others, (n,), in dB.

    Both are (n, C, H, W), uint8. The ratio is infinite for equal images.
    """
    error = (images.double() - others.double()).square().flatten(1).mean(1)
    return 10.0 * torch.log10(255.0**2 / error)


def generate_sets(config: RunConfig, pipeline: Pipeline) -> tuple[ImageSets, float]:
    """VAE samples (if there is a VAE) and refined samples of the same z by seed, and refined images per second."""
    settings = config.evaluate
    sets: ImageSets = {name: [] for name in (["vae", "refined"] if pipeline.models.has_generator else ["refined"])}
    began = time.perf_counter()
    with Progress("samples", settings.n * len(settings.seeds)) as progress:
        for seed in settings.seeds:
            vae, refined = pipeline.generate(
                settings.n, seed, advance=lambda count: progress.update(progress.step + count, count)
            )
            if vae is not None:
                sets["vae"].append(vae)
            sets["refined"].append(refined)
    return sets, settings.n * len(settings.seeds) / (time.perf_counter() - began)


def save_sample_pictures(run: Run, sets: ImageSets) -> None:
    """Write samples.png. Each VAE sample, if the encoder generates images, has its refined sample at its right."""
    first_sets = [images[0][:PICTURE_IMAGES] for images in sets.values()]
    for name, images in zip(sets, first_sets, strict=True):
        pictures.grid(images, run.images / f"{name}_samples.png")
    pictures.grid(torch.stack(first_sets, 1).flatten(0, 1), run.path / "samples.png", scale=2)


def save_reconstruction_pictures(run: Run, pipeline: Pipeline, heldout: Shards) -> None:
    """Write reconstructions.png: held-out images, each with its x_hat and, in pixel space, its refined x_hat."""
    images = heldout.read(np.arange(min(PICTURE_IMAGES, len(heldout))))
    x_hat, refined = pipeline.reconstruct(images)
    sets = {"heldout": images, "reconstructions": x_hat}
    if refined is not None:
        sets["refined_reconstructions"] = refined
    for name, each in sets.items():
        pictures.grid(each, run.images / f"{name}.png")
    side_by_side = torch.stack(list(sets.values()), 1).flatten(0, 1)
    pictures.grid(side_by_side, run.path / "reconstructions.png", columns=9 // len(sets) * len(sets), scale=2)
