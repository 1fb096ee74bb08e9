"""CelebA-HQ and CelebAMask-HQ: 30,000 faces, of 1024x1024 pixels or smaller copies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from dvae.data.images import filtered
from dvae.data.published_datasets import AttributeList
from dvae.registry.core import Shapes
from dvae.registry.sources.base import SOURCES
from dvae.registry.sources.image_files import FilesConfig, ImageFileSource

IMAGES, MASKS = "CelebA-HQ-img", "CelebAMask-HQ-mask-anno"
"""Folders of the images and of the masks in CelebAMask-HQ."""


@SOURCES.register("celebahq")
class CelebAHQ(ImageFileSource):
    """CelebA-HQ (Karras et al. 2018): a folder or zip archive of square images.

    The supported layouts are one flat folder, CelebAMask-HQ, and the layout of StarGAN v2 with 256x256 images
    (train/male, train/female, val/male, val/female).

    The labels are:

    - the 40 attributes of CelebAMask-HQ, if `attributes` is set;
    - "folder", if the images are in several folders.
    """

    license = (
        "CelebA-HQ: CC BY-NC 4.0, made of CelebA (non-commercial research only); Karras et al. 2018, Progressive "
        "Growing of GANs; Lee et al. 2020, MaskGAN (CelebAMask-HQ)"
    )
    absent = f"holds only masks ({MASKS}): name {IMAGES} or the folder that holds it"

    @dataclass(kw_only=True, slots=True)
    class Config(FilesConfig):
        attributes: str = ""
        """Path of CelebAMask-HQ-attribute-anno.txt. Its 40 attributes become labels, 1 or 0 (empty: no labels)."""

    config: Config

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.protocol = f"CelebA-HQ, the whole square image as it was given; {filtered(config.resize)}"
        self._attributes = AttributeList(config.attributes, self.names) if config.attributes else None
        self._labeled = len({PurePath(name).parent.name for name in self.names}) > 1

    def select(self, names: list[str]) -> list[str]:
        return [n for n in names if IMAGES in PurePath(n).parts] or [n for n in names if MASKS not in PurePath(n).parts]

    def labels(self, index: int) -> dict[str, str | int]:
        labels = self._attributes.of(index) if self._attributes else {}
        return labels | ({"folder": PurePath(self.names[index]).parent.name} if self._labeled else {})
