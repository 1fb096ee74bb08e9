"""A folder of images."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePath

from omegaconf import MISSING

from dvae.data.images import Crop, DamagedImage, decode, fit, is_image_name, printable, protocol
from dvae.errors import UserError, one_line
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.sources import SOURCES, Item, Source


@SOURCES.register("folder")
class Folder(Source):
    """All images under a folder, in the order of their names; a sub-folder's name is the label "folder"."""

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        path: str = MISSING
        """The folder; its sub-folders are read too. Files that are not images by their suffix are passed over."""
        crop: Crop = Crop.center
        """center: the middle square; none: the whole image, squeezed where it is not square."""
        licence: str = Source.licence
        """Licence of the images with the credit it asks for; kept in the manifest."""

    def __init__(self, config: Config, io: Shapes) -> None:
        self.config, self.io = config, io
        self.licence, self.protocol = config.licence, protocol(config.crop)
        self.root = Path(config.path).expanduser()
        if not self.root.is_dir():
            why = "is not a folder" if self.root.exists() else "does not exist"
            raise UserError(f"source.path={config.path} {why}: name a folder of images")
        files = sorted(_files(self.root))
        self.names = [name for name in files if is_image_name(name)]
        if not self.names:
            raise UserError(
                f"source.path={config.path} holds no images ({_content(files)}): "
                "name a folder with .png, .jpg or .webp files"
            )
        self.labelled = any(os.sep in name for name in self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Item:
        name = self.names[index]
        try:
            data = (self.root / name).read_bytes()
        except OSError as error:
            raise DamagedImage(f"{self.root / name}: {error.strerror}") from None
        pixels = fit(decode(data, name), self.io.image_size, self.io.channels, self.config.crop, name)
        path = PurePath(printable(name))
        return Item(path.as_posix(), pixels, {"folder": path.parent.as_posix()} if self.labelled else {})


def _files(root: Path) -> list[str]:
    """Every file under `root`, relative to it. Raises UserError where a folder cannot be listed."""

    def refuse(error: OSError) -> None:
        raise UserError(f"folder {error.filename} cannot be read: {one_line(error.strerror)}")

    found = os.walk(root, onerror=refuse)
    return [os.path.relpath(os.path.join(folder, name), root) for folder, _, names in found for name in names]


def _content(files: list[str]) -> str:
    return f"{len(files)} other files, such as {printable(files[0])}" if files else "it is empty"
