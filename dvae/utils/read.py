"""Read files safely, even if they are damaged or hostile.

Each reader checks that the path is a regular file, limits its size before it allocates memory, and returns typed
values. Every fault of a file raises `DamagedFile`, whose message is one line. No code in a file is executed.
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
"""Maximum size of a JSON file in bytes. Parsed values take up to 25 times as much memory, and 1 to 2 seconds."""
YAML_LIMIT = MIB // 4
"""Maximum size of a YAML file in bytes."""
YAML_EVENTS = 20_000
"""Maximum number of parser events (values, keys, starts and ends of collections) in a YAML file."""
YAML_DEPTH = 32
"""Maximum nesting of lists and mappings in a YAML file."""
NPY_LIMIT = 256 * MIB
"""Maximum size in bytes of an array that is read into memory."""
HEADER_LIMIT = 16 * MIB
"""Maximum size in bytes of the header of a weights file."""
ARCHIVE_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, NotImplementedError, RuntimeError,
    ValueError, OverflowError,
)  # fmt: skip
"""Errors that zipfile raises for damaged or encrypted archives, besides OSError."""
HEADER_ERRORS = (ValueError, KeyError, EOFError, TypeError, SyntaxError, RecursionError, tokenize.TokenError)
"""Errors that NumPy raises for a damaged array header."""
FILE_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket",
              stat.S_IFDIR: "a folder"}  # fmt: skip

REASONS = {"unexpected_keyword_argument": "there is no such field", "missing": "is missing"}
"""Messages that replace those of pydantic, by error type."""
forbid_extra = with_config(ConfigDict(extra="forbid"))
"""Class decorator: `check` and `read_json` then reject fields that the dataclass does not have."""


class DamagedFile(MachineError):
    """A file cannot be read. The message is "PATH: REASON"."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path}: {printable_line(reason)}")
        self.path = path
        self.reason = printable_line(reason)


def require_regular(path: str | Path) -> os.stat_result:
    """Return the status of a regular file, or of a link to one.

    Raises DamagedFile for a pipe, a device, a socket or a folder: opening a pipe may block forever, and a device may
    never end. Raises OSError if the file does not exist.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = FILE_KINDS.get(stat.S_IFMT(status.st_mode), "a special file")
        raise DamagedFile(path, f"is {kind}, not a file")
    return status


def read_bytes(path: str | Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises DamagedFile for another kind of file and for a larger file, and OSError if the file is missing.
    """
    size = require_regular(path).st_size
    if size > limit:
        raise DamagedFile(path, f"has {size} bytes, more than the {limit} that such a file may have")
    with Path(path).open("rb") as file:
        data = file.read(limit + 1)  # the file may have grown since its size was read
    if len(data) > limit:
        raise DamagedFile(path, f"has more than the {limit} bytes that such a file may have")
    return data


def read_text(path: str | Path, limit: int) -> str:
    """Read a text file of at most `limit` bytes. Raises as `read_bytes`, and DamagedFile if it is not UTF-8."""
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedFile(path, f"is not UTF-8 text ({error.reason} at byte {error.start})") from None


def parse_json(text: str | bytes, what: object) -> Any:
    """Parse one JSON value. `what` names the file in messages.

    Raises DamagedFile for a syntax error, a duplicate key, too deep nesting, and numbers with thousands of digits.
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
    """Convert a value parsed from JSON or YAML to `kind`: a dataclass, or a type such as `dict[str, int]`.

    Types are strict: a string is never converted to a number. Raises DamagedFile, which names the first wrong field.
    `what` names the file in messages.
    """
    try:
        # In strict mode, only pydantic's JSON validator accepts a mapping for a dataclass and a list for a tuple.
        return _adapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part)[:80] for part in first["loc"])
        reason = REASONS.get(first["type"], first["msg"][:200])
        raise DamagedFile(what, f"{place + ': ' if place else ''}{reason}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedFile(what, f"holds a value that cannot be read ({fold(error)[:200]})") from None


def read_json(path: str | Path, kind: Callable[..., T], limit: int = JSON_LIMIT) -> T:
    """Read the JSON file `path` as `kind` (see `check`). Raises DamagedFile, or OSError if the file is missing."""
    return check(kind, parse_json(read_bytes(path, limit), path), path)


def read_json_lines(path: str | Path, kind: Callable[..., T], limit: int = JSON_LIMIT) -> list[T]:
    """Read a file with one JSON value per line, each as `kind`. Raises DamagedFile, which names the wrong line."""
    lines = read_text(path, limit).splitlines()
    return [
        check(kind, parse_json(line, f"{path} line {number}"), f"{path} line {number}")
        for number, line in enumerate(lines, 1)
    ]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the mapping in a YAML file as plain values. Interpolations such as ${a.b} stay strings.

    Raises DamagedFile for a syntax error, a duplicate key, an alias, a tag, or too deep nesting, and if the file is not
    a mapping whose keys are strings. Aliases are rejected because a small file with nested aliases can expand to any
    size. Raises OSError if the file is missing.
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
    """Raise DamagedFile for YAML features that dvae never writes and that could exhaust the memory.

    The check reads parser events, before any value is built.
    """
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
    """Read the array in a .npy file of at most `limit` bytes.

    Raises DamagedFile for a damaged header and for a dtype other than booleans, integers and floats, and OSError if
    the file is missing.
    """
    return parse_npy(read_bytes(path, limit), path)


def parse_npy(data: bytes, what: object) -> np.ndarray:
    """Return the array in the bytes of a .npy file. Raises DamagedFile as `read_npy` does."""
    stream = io.BytesIO(data)
    shape, fortran, dtype = _npy_header(stream, what, len(data))
    values = np.frombuffer(data, dtype, math.prod(shape), stream.tell())
    return values.reshape(shape, order="F" if fortran else "C").copy()


def map_npy(path: str | Path) -> np.ndarray:
    """Map a .npy file of any size, so that its values are read from the disk when they are used.

    Raises as `read_npy` does.
    """
    size = require_regular(path).st_size
    with Path(path).open("rb") as file:
        shape, fortran, dtype = _npy_header(file, path, size)
        offset = file.tell()
    if 0 in shape:  # an empty file range cannot be mapped
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")


def _npy_header(file: Any, what: object, size: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read a .npy header: the shape, whether the order is Fortran's, and the dtype.

    Raises DamagedFile if the array does not fit in the rest of the file, which has `size` bytes.
    """
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
    """Read the arrays of a .npz file, by name.

    Args:
        path: The file.
        limit: Maximum size of all arrays together after decompression, in bytes.
        names: If given, only these arrays are read. A name that the file does not contain is ignored.

    Raises:
        DamagedFile: The file is not a valid archive of plain arrays, or it is larger than `limit`.
        OSError: The file is missing.
    """
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
    """Turn the errors that zipfile raises for a damaged archive into DamagedFile.

    Its reason is `reason`, followed by the text of the original error in parentheses.
    """
    try:
        yield
    except (*ARCHIVE_ERRORS, OSError) as error:
        # EINVAL comes from a seek to a negative offset, which a damaged archive asks for. Other OSErrors are faults of
        # the disk.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise DamagedFile(what, f"{reason} ({fold(error)[:200]})") from None


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int) -> bytes:
    """Read a member of a zip archive without holding much more than `limit` bytes in memory.

    The size that the archive states may be wrong. `ZipFile.read` would decompress far more before it notices. Raises
    DamagedFile, which names the archive and the member, and OSError if the archive cannot be read.
    """
    what, parts, size = f"{archive.filename}:{member.filename}", [], 0
    if not 0 <= member.file_size <= limit:
        raise DamagedFile(what, f"has {member.file_size} bytes, more than the {limit} that such a file may have")
    # zipfile passes `step` compressed bytes to bz2 and LZMA, which decompress all of them at once. A small step limits
    # the memory.
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
    """The description of a tensor in the header of a weights file."""

    dtype: str
    """The name of the dtype as in the file: F32, BF16, I8, ..."""
    shape: tuple[int, ...]
    """The shape."""


@dataclass
class _HeaderEntry:
    """The entry of one tensor in a safetensors header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes per element of each dtype that dvae reads."""


def read_weights_header(path: str | Path) -> dict[str, StoredTensor]:
    """Read the names, dtypes and shapes of the tensors in a safetensors file, without their values.

    Raises DamagedFile if the header is damaged or does not fit the size of the file, and OSError if the file is
    missing.
    """
    return {name: StoredTensor(entry.dtype, tuple(entry.shape)) for name, entry in _weights_entries(path)}


def read_weights_metadata(path: str | Path) -> dict[str, str]:
    """Read the metadata of a safetensors file. Raises as `read_weights_header` does."""
    header, _ = _weights_header(path)
    return check(dict[str, str], header.get("__metadata__", {}), path)


def _weights_header(path: str | Path) -> tuple[dict[str, Any], int]:
    """Read the header of a safetensors file without checking its entries.

    Returns:
        The parsed header, and the number of bytes after it.
    """
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
    # safetensors does not load a file with extra bytes. A sparse file with a huge gap would take hours to hash.
    if claimed != held:
        raise DamagedFile(path, f"has {held - claimed} bytes that belong to no tensor")
