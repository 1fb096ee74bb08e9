"""Latent space: the refiner draws the encoder's latents. Cached latents: training from them changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from dvae.config import compose
from dvae.data import latent_cache
from dvae.diffusion.conditioning import Conditioning
from dvae.errors import MachineError, UserError
from dvae.inference.noise import KeyedNoise
from dvae.inference.pipeline import Pipeline
from dvae.inference.pipeline import load as load_pipeline
from dvae.inference.refine import refine_images
from dvae.models import components
from dvae.registry.encoders.base import Posterior
from dvae.runs.folder import Run, submit
from dvae.runs.job import RunJob
from dvae.stages.cache import expected_cache
from dvae.stages.latent_sources import CachedReconstructions, open_latents

MAP = [
    "encoder=kl_gan", "encoder.channels=[16,16]", "encoder.groups=4", "encoder.latent_channels=4",
    "encoder.discriminator_weight=0", "encoder.middle_attention=false",
]  # fmt: skip
LATENT = [
    "recipe=ldm_avatars", *MAP, "image_size=16", "source.n=60", "data.workers=1", "data.heldout_fraction=0.2",
    "refiner.width=32", "refiner.multipliers=[1]", "sampler.steps=2", "evaluate.metrics=false", "evaluate.n=4",
    "evaluate.seeds=[0]",
]  # fmt: skip
QUICK = [
    f"{stage}.{word}"
    for stage in ("train_encoder", "train_refiner")
    for word in ("steps=3", "batch=4", "log_every=1", "save_every=2", "warmup=1", "preview_every=2", "precision=fp32")
]


def trained(tmp_path: Path, name: str, *words: str) -> Run:
    run = submit(compose.compose("train", [*LATENT, *QUICK, f"run={tmp_path / name}", *words]))
    RunJob(str(run.path))()
    return run


def rows(run: Run) -> list[float]:
    """The refiner's losses."""
    found = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [row["loss"] for row in found if row["stage"] == "refiner"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("latent"), "cached")


def test_a_run_in_latent_space_draws_images(run: Run) -> None:
    pipeline = load_pipeline(run.path)
    vae, refined = pipeline.generate(3, seed=1)
    assert vae is None
    assert refined.shape == (3, 3, 16, 16)
    assert refined.float().std() > 1
    assert (run.path / "samples.png").exists()
    assert len(rows(run)) == 3


def test_what_is_drawn_is_decoded_from_latents_of_the_measured_scale(run: Run) -> None:
    """With the exact denoiser of a point, sampling gives that point's image."""
    pipeline = load_pipeline(run.path)
    denoiser = pipeline.models.denoiser
    assert denoiser.shapes.channels == 4
    assert denoiser.shapes.image_size == 8
    latents = torch.randn(2, 4, 8, 8) * 0.3

    def of_a_point(u: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        x0 = denoiser.to_state(latents, conditioning)
        return denoiser.diffusion.eps_from_x0(u, t, x0), x0

    denoiser.predict = of_a_point  # type: ignore[method-assign]
    pipeline.batch = 2  # the denoiser knows these two alone, not a whole chunk
    drawn = refine_images(pipeline, pipeline.sample_conditioning(2, 0), KeyedNoise(0, range(2)))[0]
    assert torch.allclose(drawn, pipeline.decode(latents), atol=1e-4)
    made = denoiser.data_scale * _latents(run)
    assert made.std().item() == pytest.approx(1.0, abs=0.1)


def _latents(run: Run) -> torch.Tensor:
    """Draws of z of some training images, (20, *latent)."""
    settings = run.config()
    made = load_pipeline(run.path).models
    mean, logvar = latent_cache.LatentCache(run.path / "latents", expected_cache(run, settings, made)).posteriors(
        torch.arange(20)
    )
    return Posterior(mean, logvar).sample(torch.randn(mean.shape))


def test_training_from_cached_posteriors_is_training_without_them(run: Run, tmp_path: Path) -> None:
    shards = f"data.shards={run.path / 'shards'}"
    same = {"encoded": ["data.cache_gib=0"], "remembered": []}
    for name, words in same.items():
        other = trained(tmp_path, name, shards, "stages=[shards,encoder,refiner]", *words)
        assert (other.path / "weights" / "posteriors.safetensors").exists() == (name == "remembered")
        np.testing.assert_allclose(rows(other), rows(run), rtol=2e-5)


def test_cached_reconstructions_are_those_of_their_latents(tmp_path: Path) -> None:
    words = ["denoiser.space=pixel", "denoiser.condition_image=true", "cache.contents=reconstructions", "cache.draws=2"]
    run = trained(tmp_path, "pixels", *words)
    made = load_pipeline(run.path).models
    latents = open_latents(run, run.config(), made)
    assert isinstance(latents, CachedReconstructions)
    z, x_hat = latents.cache.reconstructions(torch.tensor([3, 3, 7]), torch.tensor([0, 1, 1]))
    assert (x_hat - made.encoder.decode(z)).abs().max() < 1.01 / 255
    assert not torch.equal(z[0], z[1])
    assert len(rows(run)) == 3


def test_a_cache_of_another_encoder_or_a_damaged_one_is_refused(run: Run, tmp_path: Path) -> None:
    made = components.build_models(run.config())
    wanted = expected_cache(run, run.config(), made)
    with pytest.raises(UserError, match="was made with seed 0, this run has 1"):
        latent_cache.LatentCache(run.path / "latents", latent_cache.CacheInfo(**{**vars(wanted), "seed": 1}))
    with pytest.raises(UserError, match="no finished cache"):
        latent_cache.LatentCache(tmp_path, wanted)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (run.path / "latents").iterdir():
        data = bytearray(path.read_bytes())
        if path.suffix == ".tar":
            data[2000] ^= 1
        (copy / path.name).write_bytes(data)
    with pytest.raises(MachineError, match=r"latents-000000\.tar is damaged"):
        latent_cache.LatentCache(copy, wanted)


def test_webdataset_reads_the_cache(run: Run) -> None:
    tar = run.path / "latents" / "latents-000000.tar"
    first = next(iter(webdataset.WebDataset(str(tar), shardshuffle=False).decode()))
    assert first["__key__"] == "000000000"
    assert first["npy"].shape == (2, 4, 8, 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["encoder=conv_vae_demo", "image_size=32"], "needs a square latent map"),
        (["denoiser.condition_image=true"], r"set denoiser\.condition_image=false"),
        (["denoiser.condition_latent=true"], r"set denoiser\.condition_latent=false"),
        (["prior=gmm"], "does not use prior=gmm"),
    ],
)
def test_what_has_no_place_in_latent_space_is_refused(words: list[str], message: str) -> None:
    base = LATENT if "encoder=conv_vae_demo" not in words else ["recipe=ldm_avatars"]
    with pytest.raises(UserError, match=message):
        components.build_models_on_meta(compose.to_run_config(compose.compose("train", [*base, *words])))


def test_pixels_cannot_be_kept_in_latent_space(run: Run) -> None:
    pipeline: Pipeline = load_pipeline(run.path)
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(UserError, match="inpainting: not defined"):
        pipeline.inpaint(images, torch.ones(1, 1, 16, 16, dtype=torch.bool), 0)
    with pytest.raises(UserError, match="bits per dimension: not defined"):
        pipeline.bits_per_dim(images, 0)
    x_hat, refined = pipeline.reconstruct(images)
    assert x_hat.shape == images.shape
    assert refined is None
