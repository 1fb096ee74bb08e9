"""The evaluate stage: draw sets of images, keep the pictures, and score the sets."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from dvae.config.schema import RunConfig
from dvae.data.images import to_float, to_uint8
from dvae.data.shards.reader import Shards, evenly_spaced
from dvae.inference.pipeline import Pipeline
from dvae.runs.folder import Run
from dvae.tracking import pictures
from dvae.tracking.console import Progress

SHOWN = 32
"""Images in each picture."""

Sets = dict[str, list[torch.Tensor]]
"""Generated images by name, one tensor (n, C, H, W) uint8 per seed; "vae" only where there is one."""


def evaluate(run: Run, config: RunConfig, pipeline: Pipeline, train: Shards, heldout: Shards) -> dict[str, Any]:
    """Pictures of reconstructions and samples, and their scores. Returns what summary.json holds of them."""
    sampler: Any = OmegaConf.to_container(OmegaConf.structured(config.sampler), enum_to_str=True)
    drawn: dict[str, Any] = {"sampler": sampler}
    x_hat = None
    if "encoder" in pipeline.models.trained_parts():
        show_reconstructions(run, pipeline, heldout)
        images = heldout.read(evenly_spaced(len(heldout), config.evaluate.n))
        x_hat = to_uint8(pipeline.encode(to_float(images).to(pipeline.device)).x_hat).cpu()
        drawn["reconstructions"] = {
            "n": len(images),
            "psnr": float(psnr(images, x_hat).mean()),
            "latent": list(pipeline.models.io.latent),
        }
    sets, speed = draw(config, pipeline)
    show_samples(run, sets)
    drawn |= {"nfe": pipeline.nfe, "refined_images_per_second": speed}
    if not config.evaluate.metrics:
        return drawn
    from dvae.evaluation.scorer import score  # here, since it needs the extra `metrics`

    settings = config.evaluate
    scored = score(
        sets,
        train.read(evenly_spaced(len(train), settings.n_reference)),
        heldout.read(evenly_spaced(len(heldout), settings.n * len(settings.seeds))),
        seeds=settings.seeds,
        sampler=sampler,
        nfe=pipeline.nfe,
        kid_subset_size=settings.kid_subset_size,
        kid_subsets=settings.kid_subsets,
        cache=run.path / "cache",
        reconstructions=x_hat,
        batch=settings.batch,
    )
    return drawn | scored


def psnr(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of images (n, C, H, W) uint8 against others, (n,), in dB; infinite where equal."""
    error = (images.double() - others.double()).square().flatten(1).mean(1)
    return 10.0 * torch.log10(255.0**2 / error)


def draw(config: RunConfig, pipeline: Pipeline) -> tuple[Sets, float]:
    """VAE samples (where there is a VAE) and refined samples of the same z by seed, and refined images per second."""
    settings = config.evaluate
    sets: Sets = {name: [] for name in (["vae", "refined"] if pipeline.models.has_generator else ["refined"])}
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


def show_samples(run: Run, sets: Sets) -> None:
    """samples.png: each VAE sample, where there is one, with its refined sample at its right."""
    shown = [drawn[0][:SHOWN] for drawn in sets.values()]
    for name, drawn in zip(sets, shown, strict=True):
        pictures.grid(drawn, run.images / f"{name}_samples.png")
    pictures.grid(torch.stack(shown, 1).flatten(0, 1), run.path / "samples.png", scale=2)


def show_reconstructions(run: Run, pipeline: Pipeline, heldout: Shards) -> None:
    """reconstructions.png: held-out images, each with its reconstruction and, but in latent space, that refined."""
    images = heldout.read(np.arange(min(SHOWN, len(heldout))))
    x_hat, refined = pipeline.reconstruct(images)
    shown = {"heldout": images, "reconstructions": x_hat}
    if refined is not None:
        shown["refined_reconstructions"] = refined
    for name, drawn in shown.items():
        pictures.grid(drawn, run.images / f"{name}.png")
    side_by_side = torch.stack(list(shown.values()), 1).flatten(0, 1)
    pictures.grid(side_by_side, run.path / "reconstructions.png", columns=9 // len(shown) * len(shown), scale=2)
