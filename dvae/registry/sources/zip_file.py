"""A zip archive of images."""

from __future__ import annotations

import threading
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from omegaconf import MISSING

from dvae.data.images import Crop, DamagedImage, decode, fit, is_image_name, printable, protocol
from dvae.errors import UserError, one_line
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.sources import SOURCES, Item, Source


@SOURCES.register("zip")
class Zip(Source):
    """All images in a zip archive, read in place, in the order of their names; their folder is the label "folder"."""

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        path: str = MISSING
        """The archive. Members that are not images by their suffix are passed over."""
        crop: Crop = Crop.center
        """center: the middle square; none: the whole image, squeezed where it is not square."""
        licence: str = Source.licence
        """Licence of the images with the credit it asks for; kept in the manifest."""

    def __init__(self, config: Config, io: Shapes) -> None:
        self.config, self.io = config, io
        self.licence, self.protocol = config.licence, protocol(config.crop)
        self._local = threading.local()
        try:
            members = [info for info in self._archive().infolist() if not info.is_dir()]
        except FileNotFoundError:
            raise UserError(f"source.path={config.path} does not exist: name a zip archive of images") from None
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"source.path={config.path} is not a readable zip archive: {one_line(error)}") from None
        images = [info for info in members if is_image_name(info.filename) and "__MACOSX" not in info.filename]
        if not images:
            raise UserError(
                f"source.path={config.path} holds no images ({len(members)} other files): "
                "name an archive with .png, .jpg or .webp files"
            )
        if any(info.flag_bits & 1 for info in images):
            raise UserError(f"source.path={config.path} is encrypted: unpack it and use source=folder")
        self.names = sorted({info.filename for info in images})
        self.labelled = len({PurePosixPath(name).parent for name in self.names}) > 1

    def _archive(self) -> zipfile.ZipFile:
        """This thread's open archive."""
        if not hasattr(self._local, "archive"):
            self._local.archive = zipfile.ZipFile(Path(self.config.path).expanduser())
        return self._local.archive

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_local"}  # open files stay behind

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=threading.local())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Item:
        name = self.names[index]
        try:
            data = self._archive().read(name)
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise DamagedImage(f"{self.config.path}:{name}: {one_line(error)}") from None
        pixels = fit(decode(data, name), self.io.image_size, self.io.channels, self.config.crop, name)
        path = PurePosixPath(printable(name))
        return Item(str(path), pixels, {"folder": str(path.parent)} if self.labelled else {})
