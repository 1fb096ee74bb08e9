"""Bundles of runs that were never trained, and images for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dvae.config import compose
from dvae.models import bundle_export, components

LATENT = [
    "recipe=ldm_avatars", "encoder=kl_gan", "encoder.channels=[16,16]", "encoder.groups=4", "encoder.latent_channels=4",
    "encoder.discriminator_weight=0", "encoder.middle_attention=false", "image_size=16", "refiner.width=32",
    "refiner.multipliers=[1]", "sampler.steps=2",
]  # fmt: skip
PSLD = ["process=psld", "schedule=constant", "denoiser.prediction=eps", "sampler=em", "sampler.steps=2"]
CLASSES = ["classes=[cat,dog]", "data.label=kind", "denoiser.condition_label=true", "denoiser.label_dropout=0.1"]


def exported(folder: Path, *words: str) -> Path:
    """The bundle of a run that was never trained, in fp32."""
    composed = compose.compose("train", [*words, "denoiser.data_scale=1", "train_refiner.precision=fp32"])
    made = components.build_models(compose.to_run_config(composed))
    with torch.no_grad():
        made.denoiser.refiner.out[2].weight.normal_(std=0.02)  # it starts at zero
    bundle_export.export(
        folder,
        compose.to_run_config(composed),
        {name: part.state_dict() for name, part in made.trained_parts().items()},
    )
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    return exported(tmp_path_factory.mktemp("drawing") / "bundle", *tiny)


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> dict[str, Path]:
    """Runs of other kinds, by name."""
    folder = tmp_path_factory.mktemp("kinds")
    words = {"psld": [*tiny, *PSLD], "latent": LATENT, "classes": [*tiny, *CLASSES]}
    return {name: exported(folder / name, *words[name]) for name in words}


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 20 images of 16x16, and faces.npy beside it."""
    place = tmp_path_factory.mktemp("images") / "faces"
    place.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(place / f"{number:02d}.png")
    np.save(place.with_suffix(".npy"), pixels)
    return place
