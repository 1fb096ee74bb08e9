"""What the commands that draw images take: tools/sample.py, reconstruct.py, interpolate.py, edit.py, inpaint.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from dvae.inference.noise import InterpolationSpace, SharedVariable


@dataclass(kw_only=True, slots=True)
class GenerationConfig:
    """What all of them take."""

    run: str = MISSING
    """A run folder or a bundle."""
    n: int | None = None
    """Results, each an image or a strip of them (null: of all images that are given, of a run's own the first 8)."""
    seed: int = 0
    """Seed of z and of the noise."""
    first: int = 0
    """Number of the first; number k of a seed is the same whichever is the first."""
    out: str = MISSING
    """A picture (.png), images in one file (.npy, .zip, .tar) or a folder of images (NAME/)."""
    vae: bool | None = None
    """Put the VAE's image beside each refined one (null: in a picture only, where there is a VAE)."""
    batch: int | None = None
    """Images per network call (null: fixed chunks of 16, with which image k has the same bits in any request)."""
    processes: int = 1
    """Processes of this machine that draw."""
    label: str = ""
    """Class of all images (empty: drawn evenly or that of the given image, where the run has classes)."""
    guidance: float = 1.0
    """Weight of x_hat, z and class together."""
    label_guidance: float = 1.0
    """Weight of the class alone."""
    pca_guidance: float = 1.0
    """Weight of z's principal coordinates alone."""
    classifier_guidance: float = 0.0
    """Factor on the gradient of the classifier."""
    plugins: list[str] = field(default_factory=list)
    """Modules to import, which register components."""
    sampler: Any = None
    """Another sampler than the run's, or fields of the run's own."""


@dataclass(kw_only=True, slots=True)
class SampleConfig(GenerationConfig):
    """What tools/sample.py takes."""

    n: int | None = 64
    """Images."""
    out: str = "samples.png"
    """A picture (.png), images in one file (.npy, .zip, .tar) or a folder of images (NAME/)."""
    shared: SharedVariable | None = None
    """z: all images have z and class of image 0 of the seed, so that only noise varies; noise: all have its noise."""
    intermediate: int = 0
    """Denoised estimates of each image, from evenly spread steps, that stand at its left."""


@dataclass(kw_only=True, slots=True)
class ImageInputConfig(GenerationConfig):
    """What the commands take that are given images."""

    images: str = "heldout"
    """heldout: the run's held-out images; a folder, zip archive, .npy (n, H, W, C), image file or shards; interpolate
    and edit also take drawn: the images of the seed as tools/sample.py draws them."""
    shards: str = ""
    """For heldout: where the run's shards lie, if they were moved."""
    resize: bool = False
    """Crop and scale given images to the run's size, and make them gray or color as its are."""
    original: bool | None = None
    """Put the given image at the left (null: in a picture only)."""


@dataclass(kw_only=True, slots=True)
class ReconstructConfig(ImageInputConfig):
    """What tools/reconstruct.py takes."""

    out: str = "reconstructions.png"
    """A picture (.png), images in one file (.npy, .zip, .tar) or a folder of images (NAME/)."""


@dataclass(kw_only=True, slots=True)
class InterpolateConfig(ImageInputConfig):
    """What tools/interpolate.py takes."""

    out: str = "interpolations.png"
    """A picture (.png), strips in one file (.npy, .zip, .tar) or a folder of strips (NAME/)."""
    space: InterpolationSpace = InterpolationSpace.both
    """z | noise | both: what goes from the first image of a pair to the second; the other stays that of the first."""
    steps: int = 8
    """Images of a strip, its ends included."""


@dataclass(kw_only=True, slots=True)
class EditConfig(ImageInputConfig):
    """What tools/edit.py takes."""

    out: str = "edits.png"
    """A picture (.png), strips in one file (.npy, .zip, .tar) or a folder of strips (NAME/)."""
    direction: str = MISSING
    """Name of a direction that tools/directions.py has found for the run."""
    strength: float | None = None
    """How far z is moved, in units of the direction (null: a strip of `strengths`)."""
    strengths: list[float] = field(default_factory=lambda: [-2.0, -1.0, 0.0, 1.0, 2.0])
    """A strip per image, one strength after the other; at 0 the image is only reconstructed."""


@dataclass(kw_only=True, slots=True)
class InpaintConfig(ImageInputConfig):
    """What tools/inpaint.py takes."""

    out: str = "inpainted.png"
    """A picture (.png), images in one file (.npy, .zip, .tar) or a folder of images (NAME/)."""
    mask: str = "border"
    """What is known of each image: left, right, top, bottom (half of it), center (its middle), border (all but the
    middle), or a PNG of the run's size, white where known. The rest is drawn anew."""


for name, kind in (
    ("sample", SampleConfig),
    ("reconstruct", ReconstructConfig),
    ("interpolate", InterpolateConfig),
    ("edit", EditConfig),
    ("inpaint", InpaintConfig),
):
    ConfigStore.instance().store(name=f"{name}_schema", node=kind, provider="dvae")
