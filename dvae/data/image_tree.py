"""List and read the image files in a folder or in a zip archive."""

from __future__ import annotations

import os
import threading
import zipfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from dvae.data.archives import open_zip, refuse_duplicates
from dvae.data.images import FILE_LIMIT, DamagedImage, is_image_name, printable
from dvae.errors import UserError, fold
from dvae.utils.read import DamagedFile, read_bytes, read_member


class Tree(ABC):
    """A collection of image files. It is picklable, so that several processes can read it."""

    names: list[str]
    """Sorted paths of the image files, relative to the root. Files without an image suffix are skipped."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return a file's bytes. Raises DamagedImage naming the file if it cannot be read."""


def open_tree(path: str, word: str = "source.path") -> Tree:
    """Open a folder or a zip archive of images.

    `word` is the setting that holds `path`; error messages name it. Raises UserError if `path` does not exist, cannot
    be read, or holds no images.
    """
    return FolderTree(path, word) if Path(path).expanduser().is_dir() else ZipTree(path, word)


class FolderTree(Tree):
    def __init__(self, path: str, word: str = "source.path") -> None:
        self.root = Path(path).expanduser()
        if not self.root.is_dir():
            why = "is not a folder" if self.root.exists() else "does not exist"
            raise UserError(f"{word}={path} {why}: name a folder of images")
        files = sorted(_files(self.root))
        self.names = [name for name in files if is_image_name(name)]
        if not self.names:
            raise UserError(
                f"{word}={path} holds no images ({_content(files)}): name a folder with .png, .jpg or .webp files"
            )

    def read(self, name: str) -> bytes:
        try:
            return read_bytes(self.root / name, FILE_LIMIT)
        except DamagedFile as error:
            raise DamagedImage(str(error)) from None
        except OSError as error:
            raise DamagedImage(f"{self.root / name}: {error.strerror}") from None


class ZipTree(Tree):
    def __init__(self, path: str, word: str = "source.path") -> None:
        self.path = path
        self._local = threading.local()
        try:
            members = [info for info in self._archive().infolist() if info.filename and not info.is_dir()]
        except FileNotFoundError:
            raise UserError(f"{word}={path} does not exist: name a folder or zip archive of images") from None
        except DamagedFile as error:
            raise UserError(f"{word}={path} {error.reason}: name a folder or zip archive of images") from None
        except OSError as error:
            raise UserError(f"{word}={path} is not a readable zip archive: {fold(error)}") from None
        images = [info for info in members if is_image_name(info.filename) and "__MACOSX" not in info.filename]
        if not images:
            raise UserError(
                f"{word}={path} holds no images ({_content([info.filename for info in members])}): "
                "name an archive with .png, .jpg or .webp files"
            )
        if any(info.flag_bits & 1 for info in images):
            raise UserError(f"{word}={path} is encrypted: unpack it and name the folder")
        self.names = sorted(info.filename for info in images)
        try:
            refuse_duplicates(path, self.names)
        except DamagedFile as error:
            raise UserError(f"{word}={error.path} {error.reason}") from None

    def read(self, name: str) -> bytes:
        try:
            archive = self._archive()
            return read_member(archive, archive.getinfo(name), FILE_LIMIT)
        except (OSError, DamagedFile, KeyError) as error:  # KeyError: the archive was replaced after it was listed
            raise DamagedImage(f"{self.path}:{name}: {fold(getattr(error, 'reason', error))}") from None

    def _archive(self) -> zipfile.ZipFile:
        """Return this thread's open archive. Each thread opens its own."""
        if not hasattr(self._local, "archive"):
            self._local.archive = open_zip(Path(self.path).expanduser())
        return self._local.archive

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_local"}  # open files cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=threading.local())


def _files(root: Path) -> list[str]:
    """Return the paths of all files under `root`, relative to it. Raises UserError if a folder cannot be listed."""

    def refuse(error: OSError) -> None:
        raise UserError(f"folder {error.filename} cannot be read: {fold(error.strerror)}")

    found = os.walk(root, onerror=refuse)
    return [os.path.relpath(os.path.join(folder, name), root) for folder, _, names in found for name in names]


def _content(files: list[str]) -> str:
    return f"{len(files)} other files, such as {printable(files[0])}" if files else "it is empty"
