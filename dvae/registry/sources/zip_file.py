"""A zip archive of images."""

from __future__ import annotations

from dataclasses import dataclass

from dvae.data.image_tree import ZipTree
from dvae.registry.core import Shapes
from dvae.registry.sources.base import SOURCES
from dvae.registry.sources.image_files import AnyFilesConfig, AnyImageFileSource


@SOURCES.register("zip")
class ZipSource(AnyImageFileSource):
    """All images in a zip archive, in the order of their names.

    The archive is not unpacked to the disk. If the images are in several folders, the label "folder" names the folder
    of each image.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(AnyFilesConfig):
        """The fields of AnyFilesConfig."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes, ZipTree)
