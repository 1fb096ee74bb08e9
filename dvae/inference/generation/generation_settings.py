"""Settings of the commands that generate images.

These are tools/sample.py, reconstruct.py, interpolate.py, edit.py and inpaint.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from dvae.inference.noise import InterpolationSpace, SharedVariable


@dataclass(kw_only=True, slots=True)
class GenerationConfig:
    """Settings that all generation commands share."""

    run: str = MISSING
    """A run folder or a bundle."""
    n: int | None = None
    """Number of results. Each result is one image or one strip of images (null: one for each of the given images, or
    for the first 8 of the run's own images)."""
    seed: int = 0
    """Seed of z and of the noise."""
    first: int = 0
    """Number of the first result. Result k of a seed does not depend on it."""
    out: str = MISSING
    """Output: one picture (.png), images in one file (.npy, .zip, .tar) or a folder of images (NAME/)."""
    vae: bool | None = None
    """Put the VAE's image beside each refined image (null: only in a picture, and only if the run has a VAE)."""
    batch: int | None = None
    """Images per network call (null: fixed chunks of 16; image k then has the same bits in every request)."""
    processes: int = 1
    """Number of processes on this machine that generate images."""
    label: str = ""
    """Class of all images (empty: a random class, or the class of the given image, if the run has classes)."""
    guidance: float = 1.0
    """Guidance weight of x_hat, z and class together (0: unconditional, 1: as trained, above 1: stronger)."""
    label_guidance: float = 1.0
    """Guidance weight of the class alone (0: without class, 1: as trained, above 1: stronger)."""
    pca_guidance: float = 1.0
    """Guidance weight of the principal coordinates of z alone (0: without them, 1: as trained, above 1: stronger)."""
    classifier_guidance: float = 0.0
    """Factor on the gradient of the run's classifier (0: no classifier guidance)."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import. They register components."""
    sampler: Any = None
    """A sampler that replaces the run's sampler, or changed fields of the run's sampler."""


@dataclass(kw_only=True, slots=True)
class SampleConfig(GenerationConfig):
    """Settings of tools/sample.py."""

    n: int | None = 64
    """Number of images (null: 8)."""
    out: str = "samples.png"
    """Output: one picture (.png), images in one file (.npy, .zip, .tar) or a folder of images (NAME/)."""
    shared: SharedVariable | None = None
    """z: all images use z and class of image 0 of the seed, so only the noise varies; noise: all images use the noise
    of image 0 (null: nothing is shared)."""
    intermediate: int = 0
    """Number of denoised estimates, from evenly spaced sampler steps, that are put at the left of each image."""


@dataclass(kw_only=True, slots=True)
class ImageInputConfig(GenerationConfig):
    """Settings that all commands with input images share."""

    images: str = "heldout"
    """heldout: the run's held-out images; or a folder, zip archive, .npy (n, H, W, C), image file or shards.
    interpolate and edit also accept drawn: the images of the seed that tools/sample.py generates."""
    shards: str = ""
    """Folder of the run's shards if they were moved. Used with images=heldout."""
    resize: bool = False
    """Crop and scale given images to the run's size, and convert them to gray or color like the run's images."""
    original: bool | None = None
    """Put the given image at the left of the result (null: only in a picture)."""


@dataclass(kw_only=True, slots=True)
class ReconstructConfig(ImageInputConfig):
    """Settings of tools/reconstruct.py."""

    out: str = "reconstructions.png"
    """Output: one picture (.png), images in one file (.npy, .zip, .tar) or a folder of images (NAME/)."""


@dataclass(kw_only=True, slots=True)
class InterpolateConfig(ImageInputConfig):
    """Settings of tools/interpolate.py."""

    out: str = "interpolations.png"
    """Output: one picture (.png), strips in one file (.npy, .zip, .tar) or a folder of strips (NAME/)."""
    space: InterpolationSpace = InterpolationSpace.both
    """z | noise | both: what is interpolated from the first image of a pair to the second. The rest is taken from the
    first image."""
    steps: int = 8
    """Number of images in a strip, both ends included; at least 2."""


@dataclass(kw_only=True, slots=True)
class EditConfig(ImageInputConfig):
    """Settings of tools/edit.py."""

    out: str = "edits.png"
    """Output: one picture (.png), strips in one file (.npy, .zip, .tar) or a folder of strips (NAME/)."""
    direction: str = MISSING
    """Name of a direction that tools/directions.py has found for the run."""
    strength: float | None = None
    """How far z is moved, in units of the direction (null: a strip with all `strengths`)."""
    strengths: list[float] = field(default_factory=lambda: [-2.0, -1.0, 0.0, 1.0, 2.0])
    """Strengths of the images in a strip, in units of the direction. At 0 the image is only reconstructed."""


@dataclass(kw_only=True, slots=True)
class InpaintConfig(ImageInputConfig):
    """Settings of tools/inpaint.py."""

    out: str = "inpainted.png"
    """Output: one picture (.png), images in one file (.npy, .zip, .tar) or a folder of images (NAME/)."""
    mask: str = "border"
    """The known pixels of each image: left, right, top, bottom (that half), center (the middle), border (all but the
    middle), or a PNG of the run's size that is white at known pixels. The other pixels are generated."""


for name, kind in (
    ("sample", SampleConfig),
    ("reconstruct", ReconstructConfig),
    ("interpolate", InterpolateConfig),
    ("edit", EditConfig),
    ("inpaint", InpaintConfig),
):
    ConfigStore.instance().store(name=f"{name}_schema", node=kind, provider="dvae")
