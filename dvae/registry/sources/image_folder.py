"""A folder of images."""

from __future__ import annotations

from dataclasses import dataclass

from dvae.data.image_tree import FolderTree
from dvae.registry.core import Shapes
from dvae.registry.sources.base import SOURCES
from dvae.registry.sources.image_files import AnyFilesConfig, AnyImageFileSource


@SOURCES.register("folder")
class ImageFolder(AnyImageFileSource):
    """All images below a folder, in the order of their names.

    If they are in several folders, the label "folder" names the folder of each image.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(AnyFilesConfig):
        """The fields of AnyFilesConfig."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes, FolderTree)
