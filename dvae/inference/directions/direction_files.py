"""Store directions in a bundle, beside the weights that they belong to: one file, directions.safetensors.

The header of the file describes each vector, so the vectors and their description are written together or not at all.
The header also holds the hash of the encoder's weights, because the vectors are valid only for these weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dvae.errors import MachineError, UserError, fold, suggest
from dvae.inference.directions.direction import Direction, DirectionMethod
from dvae.inference.directions.label_regression import LabelModel
from dvae.models import bundle, bundle_export
from dvae.tracking.console import say
from dvae.utils import atomic_files
from dvae.utils.read import DamagedFile, check, parse_json, read_weights_header, read_weights_metadata
from dvae.utils.weights import StateDict, load_weights, refuse_nonfinite

FILE = bundle.DIRECTIONS
HEADER_FIELDS = ("name", "unit", "attribute", "value", "share")
"""Fields of each direction in the header, in addition to its method."""
FIND_AGAIN = "find its directions again, with tools/directions.py find=[...]"
ENCODER_PREFIX = "encoder."
"""Prefix of the names of the encoder's weights in a bundle."""


def encoder_hash(folder: Path) -> str:
    """Return the SHA-256 of the encoder's weights in a bundle. Other content of the bundle does not change it.

    Raises UserError if the weights cannot be read.
    """
    path, digest = folder / bundle.WEIGHTS, hashlib.sha256()
    try:
        read_weights_header(path)
        with safe_open(path, framework="pt") as weights:
            for name in sorted(key for key in weights.keys() if key.startswith(ENCODER_PREFIX)):  # noqa: SIM118 no dict
                tensor = weights.get_tensor(name)
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy())
    except (OSError, SafetensorError, DamagedFile) as error:
        raise UserError(f"{path}: not a readable weights file ({fold(error)})") from None
    return digest.hexdigest()


def save(folder: str | Path, directions: Iterable[Direction]) -> Path:
    """Write directions into a bundle (or a run's bundle) and return the file.

    The new directions replace the stored directions of the same methods. Stored directions that were found for other
    weights of the encoder are removed.

    Raises UserError if a number is not finite, and MachineError if the file cannot be written, for example because the
    disk is full. Nothing is written then.
    """
    place, new = bundle.find_bundle(folder), list(directions)
    own_hash, methods = encoder_hash(place), {direction.method for direction in new}
    kept = [direction for direction in _usable(place, own_hash) if direction.method not in methods]
    entries = {}
    for direction in kept + new:
        fields = {name: getattr(direction, name) for name in HEADER_FIELDS}
        entries[direction.name] = fields | {"method": direction.method.name}
    tensors = {f"direction.{direction.name}": direction.vector for direction in kept + new}
    header = {"encoder_sha256": own_hash, "directions": json.dumps(entries)}
    model = next((direction.model for direction in kept + new if direction.model is not None), None)
    if model is not None:  # all directions of method labels were found together and share one model
        tensors |= {"labels.readout": model.readout, "labels.effects": model.effects}
        header["attributes"] = json.dumps(model.attributes)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    refuse_nonfinite(tensors, f"{place}: directions")
    try:
        atomic_files.write_file(place / FILE, lambda aside: save_file(tensors, aside, header))
    except SafetensorError as error:
        raise MachineError(f"{place / FILE} could not be written ({fold(error)}): make room") from None
    bundle_export.update_hash(place, FILE)
    return place / FILE


def load_all(folder: str | Path) -> dict[str, Direction]:
    """Read all directions of a bundle (or of a run's bundle), by name, in the order in which they were found.

    Returns an empty dict if there are none. Raises UserError if the directions were found for other weights of the
    encoder, or if the file cannot be read.
    """
    place = bundle.find_bundle(folder)
    if _stale(place, encoder_hash(place)):
        raise UserError(
            f"{place / FILE} was found for other weights of the encoder: find its directions again, with "
            "tools/directions.py find=[...]"
        )
    return _read(place)


def names(folder: str | Path) -> list[str]:
    """Return the names of the directions of a bundle (or of a run's bundle). Raises as `load_all`."""
    return list(load_all(folder))


def load(folder: str | Path, name: str) -> Direction:
    """Read one direction of a bundle (or of a run's bundle).

    Raises UserError as `load_all`, or if there is no direction with this name; the message then has the nearest name.
    """
    known = load_all(folder)
    if name not in known:
        hint = suggest(name, known) if known else "none were found yet: use tools/directions.py find=[labels,pca]"
        raise UserError(f"direction={name}: {folder} has no such direction: {hint}")
    return known[name]


@dataclass
class _DirectionEntry:
    """The description of one direction in the header."""

    name: str
    unit: str
    attribute: str
    value: str
    share: float | None
    method: str


@dataclass
class _DirectionsHeader:
    """The header of the file."""

    encoder_sha256: str
    directions: dict[str, _DirectionEntry]
    attributes: dict[str, list[str]]


def _header(path: Path) -> _DirectionsHeader:
    try:
        metadata = read_weights_metadata(path)
        parsed = {name: parse_json(metadata.get(name, "{}"), path) for name in ("directions", "attributes")}
        return check(_DirectionsHeader, {"encoder_sha256": metadata.get("encoder_sha256"), **parsed}, path)
    except (OSError, DamagedFile) as error:
        raise UserError(f"{fold(error)}: not a readable file of directions: {FIND_AGAIN}") from None


def _usable(place: Path, own_hash: str) -> list[Direction]:
    """Return the stored directions that can be kept: none if they belong to other weights or the file is damaged."""
    try:
        return [] if _stale(place, own_hash) else list(_read(place).values())
    except UserError as error:
        say(f"{fold(error)}; the old ones are replaced")
        return []


def _stale(place: Path, own_hash: str) -> bool:
    """Whether there are stored directions and they belong to other weights of the encoder."""
    path = place / FILE
    return path.is_file() and _header(path).encoder_sha256 != own_hash


def _read(place: Path) -> dict[str, Direction]:
    path = place / FILE
    if not path.is_file():
        return {}
    bundle.verify_file(place, bundle.read_info(place), FILE)
    tensors, header = load_weights(path), _header(path)
    model = _label_model(tensors, header, path)
    return {name: _direction(name, entry, tensors, model, path) for name, entry in header.directions.items()}


def _label_model(tensors: StateDict, header: _DirectionsHeader, path: Path) -> LabelModel | None:
    """Return the regressions that all directions of method labels share; None if there are no attributes.

    Raises UserError if the tensors are missing, do not fit the attributes or are not finite.
    """
    if not header.attributes:
        return None
    sizes = [len(values) for values in header.attributes.values()]
    pairs = (sum(sizes) ** 2 - sum(size**2 for size in sizes)) // 2
    empty = torch.empty(0)
    readout, effects = (tensors.get(f"labels.{name}", empty) for name in ("readout", "effects"))
    fits = readout.ndim == effects.ndim == 2 and min(sizes) > 0
    fits = (
        fits
        and readout.shape == (effects.shape[1] + 1, sum(sizes))
        and len(effects) in (sum(sizes), sum(sizes) + pairs)
    )
    if not fits or not torch.isfinite(readout).all() or not torch.isfinite(effects).all():
        raise UserError(f"{path}: its tensors do not fit its attributes: {FIND_AGAIN}")
    return LabelModel(header.attributes, readout.double(), effects.double())


def _direction(
    name: str, entry: _DirectionEntry, tensors: StateDict, model: LabelModel | None, path: Path
) -> Direction:
    vector = tensors.get(f"direction.{name}")
    if vector is None or not vector.is_floating_point() or not torch.isfinite(vector).all():
        raise UserError(f"{path}: direction {name[:80]!r} has no vector of numbers: {FIND_AGAIN}")
    if entry.method not in DirectionMethod.__members__:
        raise UserError(
            f"{path}: direction {name[:80]!r}: method {entry.method[:80]!r}: {suggest('', DirectionMethod.__members__)}"
        )
    method = DirectionMethod[entry.method]
    shared = model if method is DirectionMethod.labels else None
    if shared is not None and entry.value not in shared.attributes.get(entry.attribute, []):
        raise UserError(f"{path}: direction {name[:80]!r} has an attribute that the file does not hold: {FIND_AGAIN}")
    if shared is not None and len(shared.readout) != vector.numel() + 1:
        raise UserError(
            f"{path}: direction {name[:80]!r} is of another latent than the file's attributes: {FIND_AGAIN}"
        )
    return Direction(vector=vector, model=shared, **(asdict(entry) | {"method": method}))
