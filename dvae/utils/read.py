"""Read files that a stranger may have written.

Each reader checks that the path is a regular file, bounds its size before it takes memory, and returns typed values.
Everything that is wrong with a file ends in `DamagedFile`, whose message is one line. Nothing in a file is executed.
"""

from __future__ import annotations

import errno
import functools
import io
import json
import lzma
import math
import os
import stat
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from omegaconf._utils import get_yaml_loader
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from dvae.errors import MachineError, fold, printable_line

T = TypeVar("T")
MIB = 2**20
JSON_LIMIT = 4 * MIB
"""Bytes of a JSON file. Parsed values take up to 25 times as much memory, and a second or two."""
YAML_LIMIT = MIB // 4
"""Bytes of a YAML file."""
YAML_EVENTS = 20_000
"""Values, keys and brackets in a YAML file."""
YAML_DEPTH = 32
"""Nested lists and mappings in a YAML file."""
NPY_LIMIT = 256 * MIB
"""Bytes of an array that is read into memory."""
HEADER_LIMIT = 16 * MIB
"""Bytes of the header of a weights file."""
ARCHIVE_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, NotImplementedError, RuntimeError,
    ValueError, OverflowError,
)  # fmt: skip
"""What zipfile raises for damaged or encrypted archives, besides OSError."""
HEADER_ERRORS = (ValueError, KeyError, EOFError, TypeError, SyntaxError, RecursionError, tokenize.TokenError)
"""What NumPy raises for a damaged header of an array."""
FILE_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket",
              stat.S_IFDIR: "a folder"}  # fmt: skip

REASONS = {"unexpected_keyword_argument": "there is no such field", "missing": "is missing"}
"""Plain words for some of pydantic's messages."""
forbid_extra = with_config(ConfigDict(extra="forbid"))
"""Class decorator: `check` and `read_json` then refuse fields that the dataclass does not have."""


class DamagedFile(MachineError):
    """A file that cannot be read: `path` and `reason`. The message is "PATH: REASON"."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path}: {printable_line(reason)}")
        self.path = path
        self.reason = printable_line(reason)


def require_regular(path: str | Path) -> os.stat_result:
    """Return the status of a regular file (or a link to one).

    Raises DamagedFile for a pipe, a device, a socket or a folder: opening one may block for ever, and a device never
    ends. Raises OSError if there is no such file.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = FILE_KINDS.get(stat.S_IFMT(status.st_mode), "a special file")
        raise DamagedFile(path, f"is {kind}, not a file")
    return status


def read_bytes(path: str | Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes. Raises DamagedFile for any other; OSError if missing."""
    size = require_regular(path).st_size
    if size > limit:
        raise DamagedFile(path, f"has {size} bytes, more than the {limit} that such a file may have")
    with Path(path).open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise DamagedFile(path, f"has more than the {limit} bytes that such a file may have")
    return data


def read_text(path: str | Path, limit: int) -> str:
    """As `read_bytes`, decoded from UTF-8. Raises DamagedFile for other bytes."""
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedFile(path, f"is not UTF-8 text ({error.reason} at byte {error.start})") from None


def parse_json(text: str | bytes, what: object) -> Any:
    """Parse one JSON value; `what` names its place in messages.

    Raises DamagedFile for a syntax error, a key that is there twice, too deep nesting, and numbers of thousands of
    digits.
    """
    try:
        return json.loads(text, object_pairs_hook=_refuse_duplicates)
    except RecursionError:
        raise DamagedFile(what, "is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, a duplicate, too many digits
        raise DamagedFile(what, f"is not valid JSON ({error})") from None


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return made


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def check(kind: Callable[..., T], value: Any, what: object) -> T:
    """`value` (of JSON or YAML) as `kind`: a dataclass, or a type such as `dict[str, int]`.

    Types are strict: no text is taken for a number. Raises DamagedFile naming the first wrong field.
    """
    try:
        return _adapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part)[:80] for part in first["loc"])
        reason = REASONS.get(first["type"], first["msg"][:200])
        raise DamagedFile(what, f"{place + ': ' if place else ''}{reason}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedFile(what, f"holds a value that cannot be read ({fold(error)[:200]})") from None


def read_json(path: str | Path, kind: Callable[..., T], limit: int = JSON_LIMIT) -> T:
    """The JSON file at `path` as `kind` (see `check`). Raises DamagedFile, or OSError if it is missing."""
    return check(kind, parse_json(read_bytes(path, limit), path), path)


def read_json_lines(path: str | Path, kind: Callable[..., T], limit: int = JSON_LIMIT) -> list[T]:
    """The values of a file with one JSON value per line, each as `kind`. Raises DamagedFile naming the line."""
    lines = read_text(path, limit).splitlines()
    return [
        check(kind, parse_json(line, f"{path} line {number}"), f"{path} line {number}")
        for number, line in enumerate(lines, 1)
    ]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file as plain values; interpolations such as ${a.b} stay text.

    Raises DamagedFile for a syntax error, a key that is there twice, an alias (aliases can grow to any size), a tag,
    too deep nesting, or anything but a mapping with text as keys.
    """
    text = read_text(path, YAML_LIMIT)
    try:
        _check_yaml_events(text, path)
        value = yaml.load(text, Loader=get_yaml_loader())  # a subclass of SafeLoader; tags were refused above
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, AttributeError) as error:
        raise DamagedFile(path, f"is not valid YAML ({fold(error)[:200]})") from None
    if not isinstance(value, dict) or not _has_text_keys(value):
        raise DamagedFile(path, "is not a mapping with text as keys")
    return value


def _check_yaml_events(text: str, path: object) -> None:
    """Refuse, before any value is built, what can make a small YAML file large."""
    depth = 0
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for count, event in enumerate(yaml.parse(text, Loader=loader)):
        if count > YAML_EVENTS:
            raise DamagedFile(path, f"holds more than {YAML_EVENTS} values")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise DamagedFile(path, "uses aliases, which dvae never writes")
        if getattr(event, "tag", None):
            raise DamagedFile(path, f"uses the tag {event.tag[:80]!r}, which dvae never writes")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > YAML_DEPTH:
            raise DamagedFile(path, "is nested too deeply")


def _has_text_keys(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _has_text_keys(item) for key, item in value.items())
    return all(map(_has_text_keys, value)) if isinstance(value, list) else True


def read_npy(path: str | Path, limit: int = NPY_LIMIT) -> np.ndarray:
    """The array of a .npy file. Raises DamagedFile for a damaged header, and for anything but plain numbers."""
    return parse_npy(read_bytes(path, limit), path)


def parse_npy(data: bytes, what: object) -> np.ndarray:
    """The array of the bytes of a .npy file; raises as `read_npy`."""
    stream = io.BytesIO(data)
    shape, fortran, dtype = _npy_header(stream, what, len(data))
    values = np.frombuffer(data, dtype, math.prod(shape), stream.tell())
    return values.reshape(shape, order="F" if fortran else "C").copy()


def map_npy(path: str | Path) -> np.ndarray:
    """The array of a .npy file of any size, read from the disk as it is used; raises as `read_npy`."""
    size = require_regular(path).st_size
    with Path(path).open("rb") as file:
        shape, fortran, dtype = _npy_header(file, path, size)
        offset = file.tell()
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")


def _npy_header(file: Any, what: object, size: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and dtype, which fit the bytes that follow."""
    try:
        version = np.lib.format.read_magic(file)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = reader(file)
    except (*HEADER_ERRORS, MemoryError) as error:
        raise DamagedFile(what, f"is not a .npy array ({fold(error)[:200]})") from None
    if dtype.hasobject or dtype.kind not in "biuf":
        raise DamagedFile(what, f"holds {str(dtype)[:80]}, not plain numbers")
    whole = all(type(side) is int and side >= 0 for side in shape)
    if not whole or math.prod(shape) * dtype.itemsize > size - file.tell():
        raise DamagedFile(what, f"has the shape {str(shape)[:80]}, which does not fit its {size} bytes")
    return shape, fortran, dtype


def read_npz(path: str | Path, limit: int = NPY_LIMIT, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a .npz file, by name, or only those of `names` that it has; raises as `read_npy`."""
    require_regular(path)
    with archive_errors(path, "is not a .npz archive"), zipfile.ZipFile(path) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        if sum(member.file_size for member in archive.infolist()) > limit:
            raise DamagedFile(path, f"holds more than {limit} bytes")
        return {
            name: parse_npy(read_member(archive, member, limit), f"{path}:{name}")
            for name, member in members.items()
            if names is None or name in names
        }


@contextmanager
def archive_errors(what: object, reason: str) -> Iterator[None]:
    """Translate what zipfile raises for a damaged archive into DamagedFile, whose `reason` is followed by its words."""
    try:
        yield
    except (*ARCHIVE_ERRORS, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a place before the file's beginning
            raise
        raise DamagedFile(what, f"{reason} ({fold(error)[:200]})") from None


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int) -> bytes:
    """The bytes of a member of a zip archive, of which at most `limit` are ever in memory.

    The size that the archive states need not be true: `ZipFile.read` would decompress far more before it notices.
    Raises DamagedFile naming the archive and the member; OSError if the archive cannot be read.
    """
    what, parts, size = f"{archive.filename}:{member.filename}", [], 0
    if not 0 <= member.file_size <= limit:
        raise DamagedFile(what, f"has {member.file_size} bytes, more than the {limit} that such a file may have")
    # bz2 and LZMA decompress all of what they are fed, so they are fed little
    step = MIB if member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) else 4096
    with archive_errors(what, "cannot be unpacked"), archive.open(member) as file:
        while size <= member.file_size and (part := file.read(step)):
            parts.append(part)
            size += len(part)
    if size != member.file_size:
        raise DamagedFile(what, f"has {size} bytes, not the {member.file_size} that its archive states")
    return b"".join(parts)


@dataclass(frozen=True)
class StoredTensor:
    """What the header of a weights file says of a tensor."""

    dtype: str
    """As in the file: F32, BF16, I8, ..."""
    shape: tuple[int, ...]


@dataclass
class _HeaderEntry:
    """One entry of the header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def read_weights_header(path: str | Path) -> dict[str, StoredTensor]:
    """Names, dtypes and shapes of a safetensors file, without its numbers.

    Raises DamagedFile if the header is damaged, or does not fit the size of the file; OSError if the file is missing.
    """
    return {name: StoredTensor(entry.dtype, tuple(entry.shape)) for name, entry in _weights_entries(path)}


def read_weights_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file; raises as `read_weights_header`."""
    header, _ = _weights_header(path)
    return check(dict[str, str], header.get("__metadata__", {}), path)


def _weights_header(path: str | Path) -> tuple[dict[str, Any], int]:
    """The header as it is, and the bytes of numbers after it."""
    size = require_regular(path).st_size
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise DamagedFile(path, f"is not a weights file (a header of {length} bytes in {size})")
        header = parse_json(file.read(length), path)
    if not isinstance(header, dict):
        raise DamagedFile(path, "is not a weights file (its header is no mapping)")
    return header, size - 8 - length


def _weights_entries(path: str | Path) -> Iterator[tuple[str, _HeaderEntry]]:
    header, held = _weights_header(path)
    claimed = 0
    for name, value in header.items():
        if name == "__metadata__":
            continue
        entry = check(_HeaderEntry, value, f"{path}: {name[:80]}")
        begin, end = entry.data_offsets
        if entry.dtype not in DTYPE_BYTES:
            raise DamagedFile(path, f"{name[:80]!r} has the unknown type {entry.dtype[:20]!r}")
        if min(entry.shape, default=0) < 0 or end - begin != math.prod(entry.shape) * DTYPE_BYTES[entry.dtype]:
            raise DamagedFile(path, f"{name[:80]!r} has a shape that does not fit its bytes")
        if not 0 <= begin <= end <= held:
            raise DamagedFile(path, f"{name[:80]!r} reaches beyond the file: it is cut off")
        claimed = max(claimed, end)
        yield name, entry
    if claimed != held:  # such a file cannot be loaded, and a sparse one would take hours to hash
        raise DamagedFile(path, f"has {held - claimed} bytes that belong to no tensor")
