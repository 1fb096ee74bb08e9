"""AFHQ: about 15,000 faces of cats, dogs and wild animals, of 512x512 pixels, in two versions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from dvae.data.images import filtered
from dvae.data.published_datasets import PublishedSplit
from dvae.errors import UserError
from dvae.registry.core import Shapes
from dvae.registry.sources.base import SOURCES
from dvae.registry.sources.image_files import FilesConfig, ImageFileSource

ANIMALS = ("cat", "dog", "wild")
TEST_NAMES = {"val": "v1", "test": "v2"}
"""Folder of the test images -> version of AFHQ that has this folder."""


@SOURCES.register("afhq")
class AFHQ(ImageFileSource):
    """AFHQ (Choi et al. 2020), all three animals. The label "animal" is cat, dog or wild.

    The source is a folder or zip archive with train/cat, train/dog and train/wild. The test images are in the same
    folders below val or test:

    - val: version 1, JPEG, 14,630 training images.
    - test: version 2, PNG, rescaled with Lanczos.

    If there is only train, PNG files mean version 2.
    """

    license = "AFHQ: CC BY-NC 4.0 (NAVER Corporation); Choi et al. 2020, StarGAN v2"
    absent = (
        "has none of train/cat, train/dog, train/wild: name the folder or zip archive that holds train and val or test"
    )

    @dataclass(kw_only=True, slots=True)
    class Config(FilesConfig):
        split: PublishedSplit = PublishedSplit.train
        """Part of the data set: train (used by the papers for training), test (named val in version 1), or all."""

    config: Config

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.protocol = (
            f"AFHQ {self.version}, {config.split.value} images, the whole square image; {filtered(config.resize)}"
        )

    def select(self, names: list[str]) -> list[str]:
        animals = [name for name in names if len(PurePath(name).parts) > 2 and PurePath(name).parent.name in ANIMALS]
        self.version = self._version(animals)
        wanted = {
            PublishedSplit.train: {"train"},
            PublishedSplit.test: set(TEST_NAMES),
            PublishedSplit.all: {"train", *TEST_NAMES},
        }[self.config.split]
        chosen = [name for name in animals if _split(name) in wanted]
        lacking = sorted(set(ANIMALS) - {PurePath(name).parent.name for name in chosen})
        if chosen and lacking:
            raise UserError(
                f"source.path={self.config.path} has no {' and no '.join(lacking)} in {self.config.split.value}: "
                "AFHQ is cat, dog and wild (source=folder takes any folder)"
            )
        return chosen

    def _version(self, names: list[str]) -> str:
        """Return v1 or v2, from the folder of the test images, or from the file format if there is no such folder.

        Raises UserError if the folders of both versions exist.
        """
        found = {TEST_NAMES[_split(name)] for name in names if _split(name) in TEST_NAMES}
        if len(found) > 1:
            raise UserError(
                f"source.path={self.config.path} holds val (version 1) and test (version 2), mostly the same animals: "
                "name one version"
            )
        return found.pop() if found else "v2" if any(name.lower().endswith(".png") for name in names) else "v1"

    def labels(self, index: int) -> dict[str, str | int]:
        return {"animal": PurePath(self.names[index]).parent.name}


def _split(name: str) -> str:
    return PurePath(name).parent.parent.name
