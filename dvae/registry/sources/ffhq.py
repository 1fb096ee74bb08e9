"""FFHQ: 70,000 faces from Flickr, of 1024x1024 pixels or as thumbnails of 128x128."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from dvae.data.images import filtered
from dvae.errors import UserError
from dvae.registry.core import Shapes
from dvae.registry.sources.base import SOURCES
from dvae.registry.sources.image_files import FilesConfig, ImageFileSource

VARIANTS = ("images1024x1024", "thumbnails128x128", "in-the-wild-images")
"""Folders of the published data set. The last one holds photographs of any shape."""


@SOURCES.register("ffhq")
class FFHQ(ImageFileSource):
    """FFHQ (Karras et al. 2019), without labels.

    The source is images1024x1024, thumbnails128x128, or any folder or zip archive of aligned square images. The
    published data set has sub-folders of 1,000 images each. They have no meaning, so they do not become labels.
    """

    license = (
        "FFHQ: CC BY-NC-SA 4.0 (NVIDIA), single photographs CC BY 2.0, CC BY-NC 2.0, public domain or CC0 of their "
        "authors; Karras et al. 2019, A Style-Based Generator Architecture"
    )

    @dataclass(kw_only=True, slots=True)
    class Config(FilesConfig):
        """The fields of FilesConfig."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.protocol = f"FFHQ, the whole square image as it was given; {filtered(config.resize)}"

    def select(self, names: list[str]) -> list[str]:
        found = [variant for variant in VARIANTS if any(variant in PurePath(name).parts for name in names)]
        if len(found) > 1:
            raise UserError(
                f"source.path={self.config.path} holds {' and '.join(found)}, the same faces twice: name one of them"
            )
        return names
