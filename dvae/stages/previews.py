"""Preview pictures, drawn from the averaged weights while a stage trains."""

from __future__ import annotations

from pathlib import Path

import torch

from dvae.config.model_config import model_config
from dvae.config.schema import RunConfig
from dvae.inference.pipeline import Pipeline
from dvae.runs.folder import Run
from dvae.stages.run_models import load_models
from dvae.toy2d import points
from dvae.tracking import pictures, scatter
from dvae.training.batches import open_shards
from dvae.utils.weights import StateDict

PREVIEW_IMAGES = 32
"""Maximum number of images in a preview."""
PREVIEW_POINTS = 1000
"""Number of points per class in a preview."""


def preview_images(config: RunConfig) -> torch.Tensor:
    """Return the first held-out images, (n, C, H, W), uint8."""
    shards = open_shards(config, "heldout")
    return shards.read(torch.arange(min(PREVIEW_IMAGES, len(shards))).numpy())


def build_pipeline(run: Run, config: RunConfig, denoiser: StateDict) -> Pipeline:
    """Build a pipeline from the trained encoder and prior, and from `denoiser`, the weights of the denoiser."""
    models = load_models(run, config, "encoder", "prior")
    models.denoiser.load_state_dict(denoiser)
    models.denoiser.eval()
    return Pipeline(model_config(config), models, config.evaluate.batch)


def save_samples(run: Run, pipeline: Pipeline, name: str) -> Path:
    """Write refined samples to images/NAME, below the VAE samples of the same z if the encoder generates images."""
    vae, refined = pipeline.generate(PREVIEW_IMAGES, pipeline.config.seed)
    path = run.images / name
    pictures.grid(refined if vae is None else torch.cat([vae, refined]), path)
    return path


def save_points(run: Run, config: RunConfig, pipeline: Pipeline, name: str) -> Path:
    """Write a scatter plot of true and generated points to images/NAME."""
    path = run.images / name
    source = points.open_source(config)
    groups = points.label_groups(config, source).items()
    true = {name: points.true_points(source, label, PREVIEW_POINTS, config.seed) for name, label in groups}
    drawn = {name: points.sample_points(pipeline, label, PREVIEW_POINTS, config.seed) for name, label in groups}
    scatter.compare(true, drawn, path)
    return path
