"""Directions beside the weights that they belong to: one file in the bundle, directions.safetensors.

The file's own header says what each vector is, so it is complete or absent as a whole. It carries the hash of the
encoder's weights: in the latent space of others the vectors mean nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dvae import bundle, files
from dvae.directions.direction import Direction, Method
from dvae.directions.labels import LabelModel
from dvae.errors import MachineError, UserError, near, one_line

FILE = bundle.DIRECTIONS
WORDS = ("name", "unit", "attribute", "value", "share")
"""What is said of each in the header, besides its method."""
ENCODER = "encoder."
"""How the names of the encoder's weights begin in a bundle."""


def encoder_hash(folder: Path) -> str:
    """Hex digest of the encoder's weights in a bundle, whatever else the bundle holds.

    Raises UserError where it has none.
    """
    path, digest = folder / bundle.WEIGHTS, hashlib.sha256()
    try:
        with safe_open(path, framework="pt") as weights:
            for name in sorted(key for key in weights.keys() if key.startswith(ENCODER)):  # noqa: SIM118 no dict
                tensor = weights.get_tensor(name)
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable weights file ({one_line(error)})") from None
    return digest.hexdigest()


def save(folder: str | Path, directions: Iterable[Direction]) -> Path:
    """Put directions into a bundle (or a run's bundle), in the place of those found by the same methods; returns the
    file.

    Those that were found for other weights of the encoder are thrown away.
    """
    place, new = bundle.folder_of(folder), list(directions)
    own, methods = encoder_hash(place), {one.method for one in new}
    old = [] if _stale(place, own) else list(_read(place).values())
    every = [one for one in old if one.method not in methods] + new
    about = {one.name: {name: getattr(one, name) for name in WORDS} | {"method": one.method.name} for one in every}
    tensors = {f"direction.{one.name}": one.vector for one in every}
    header = {"encoder_sha256": own, "directions": json.dumps(about)}
    model = next((one.model for one in every if one.model is not None), None)
    if model is not None:  # one find by labels makes one model for all
        tensors |= {"labels.readout": model.readout, "labels.effects": model.effects}
        header["attributes"] = json.dumps(model.attributes)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    try:
        files.write_file(place / FILE, lambda aside: save_file(tensors, aside, header))
    except SafetensorError as error:
        raise MachineError(f"{place / FILE} could not be written ({one_line(error)}): make room") from None
    return place / FILE


def load_all(folder: str | Path) -> dict[str, Direction]:
    """Every direction of a bundle (or of a run's bundle), by name, in the order in which they were found; may be none.

    Raises UserError where they were found for other weights of the encoder, or the file is not readable.
    """
    place = bundle.folder_of(folder)
    if _stale(place, encoder_hash(place)):
        raise UserError(
            f"{place / FILE} was found for other weights of the encoder: find its directions again, with "
            "tools/directions.py find=[...]"
        )
    return _read(place)


def names(folder: str | Path) -> list[str]:
    """Names of the directions of a bundle (or of a run's bundle), as `load_all`."""
    return list(load_all(folder))


def load(folder: str | Path, name: str) -> Direction:
    """A direction of a bundle (or of a run's bundle). Raises UserError as `load_all`, and with the nearest name where
    there is none of this name."""
    known = load_all(folder)
    if name not in known:
        hint = near(name, known) if known else "none were found yet: use tools/directions.py find=[labels,pca]"
        raise UserError(f"direction={name}: {folder} has no such direction: {hint}")
    return known[name]


def _header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
        parsed = {name: json.loads(found.get(name, "{}")) for name in ("directions", "attributes")}
        return {"encoder_sha256": found["encoder_sha256"], **parsed}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: not a readable file of directions ({one_line(error)}): remove it and find them again"
        ) from None


def _stale(place: Path, own: str) -> bool:
    """Whether there are directions, of other weights."""
    path = place / FILE
    return path.is_file() and _header(path)["encoder_sha256"] != own


def _read(place: Path) -> dict[str, Direction]:
    path = place / FILE
    if not path.is_file():
        return {}
    tensors, header = bundle.load_weights(path), _header(path)
    model = None
    if header["attributes"]:
        model = LabelModel(header["attributes"], tensors["labels.readout"], tensors["labels.effects"])
    found = {}
    for name, words in header["directions"].items():
        method = Method[words["method"]]
        found[name] = Direction(
            vector=tensors[f"direction.{name}"],
            model=model if method is Method.labels else None,
            **(words | {"method": method}),
        )
    return found
