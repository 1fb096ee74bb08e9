"""CelebA: 202,599 faces of celebrities, of 178x218 pixels, with 40 attributes each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from PIL import Image

from dvae.data.images import DamagedImage, filtered
from dvae.data.published_datasets import AttributeList
from dvae.registry.core import Shapes
from dvae.registry.sources.base import SOURCES
from dvae.registry.sources.image_files import FilesConfig, ImageFileSource

WIDTH, HEIGHT = 178, 218
"""Size in pixels of the aligned and cropped images (img_align_celeba)."""


class CelebaCrop(Enum):
    """Part of an image that is scaled to a square. Metrics of different crops cannot be compared."""

    squash = "squash"
    """The whole image, squeezed to a square, as in the public code of DiffuseVAE and PSLD."""
    center_140 = "center_140"
    """The center 140x140 pixels, as in NCSN and score SDE (Song et al. 2021)."""
    center_148 = "center_148"
    """The center 148x148 pixels, which is common for VAEs."""
    center_178 = "center_178"
    """The center 178x178 pixels, the largest square."""
    face_128 = "face_128"
    """128x128 pixels around the face, with the center (89, 121), as in DDIM (Song et al. 2021)."""


BOXES = {
    CelebaCrop.squash: (0, 0, WIDTH, HEIGHT),
    CelebaCrop.center_140: (19, 39, 159, 179),
    CelebaCrop.center_148: (15, 35, 163, 183),
    CelebaCrop.center_178: (0, 20, 178, 198),
    CelebaCrop.face_128: (25, 57, 153, 185),
}
"""Left, top, right and bottom of each crop, in pixels; right and bottom are exclusive."""


@SOURCES.register("celeba")
class CelebA(ImageFileSource):
    """CelebA (Liu et al. 2015), aligned and cropped images; the labels are the attributes.

    The source is a folder or the original img_align_celeba.zip.
    """

    license = (
        "CelebA: non-commercial research only, no redistribution (agreement of MMLab, CUHK); Liu et al. 2015, "
        "Deep Learning Face Attributes in the Wild"
    )

    @dataclass(kw_only=True, slots=True)
    class Config(FilesConfig):
        crop: CelebaCrop = CelebaCrop.center_140
        """Part of each image that is scaled: squash | center_140 | center_148 | center_178 | face_128."""
        attributes: str = ""
        """Path of list_attr_celeba.txt. Its 40 attributes become labels, 1 or 0 (empty: no labels)."""

    config: Config

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        left, top, right, bottom = BOXES[config.crop]
        self.protocol = (
            f"CelebA aligned {WIDTH}x{HEIGHT}, {config.crop.value}: x {left} to {right}, y {top} to {bottom}; "
            f"{filtered(config.resize)}"
        )
        self._attributes = AttributeList(config.attributes, self.names) if config.attributes else None

    def square(self, image: Image.Image, name: str) -> Image.Image:
        if image.size != (WIDTH, HEIGHT):
            raise DamagedImage(
                f"{name}: {image.width}x{image.height} pixels, CelebA's aligned images (img_align_celeba) are "
                f"{WIDTH}x{HEIGHT}"
            )
        return image.crop(BOXES[self.config.crop])

    def labels(self, index: int) -> dict[str, str | int]:
        return self._attributes.of(index) if self._attributes else {}
