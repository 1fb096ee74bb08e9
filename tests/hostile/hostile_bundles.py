"""Bundles that a stranger could send: damaged, edited, or made to run, send, import or take what they must not.

`hostile_bundles(address)` yields `HostileBundle`s. Each changes a copy of a sound bundle; most make the hashes right
again afterwards, as an author who means harm would.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file
from tests_support import reseal

ABOUT, CONFIG, WEIGHTS, DIRECTIONS = "bundle.json", "config.yaml", "model.safetensors", "directions.safetensors"
Change = Callable[[Path], object]
WRONG: list[Any] = [None, [], {}, "x", -1, 1e308, "${oc.env:WANDB_API_KEY}", 10**30]
"""Values of wrong types or sizes."""


@dataclass(frozen=True)
class HostileBundle:
    """One case."""

    name: str
    change: Change
    sound: bool | None = False
    """False: it is refused; True: it draws the same images as the bundle that was copied; None: either."""
    tool: str = "sample"
    sealed: bool = True
    """Whether the hashes are made right again."""


def hostile_bundles(address: str) -> Iterator[HostileBundle]:
    """All cases; `address` is a web server that must hear nothing."""
    yield HostileBundle("unchanged", lambda folder: None, sound=True)
    yield HostileBundle("a file more", lambda folder: (folder / "evil_module.py").write_text("boom"), sound=True)
    yield from special_files()
    yield from damaged_bytes()
    yield from about_fields()
    yield from config_texts()
    yield from config_fields()
    yield from config_extras(address)
    yield from weights_files()
    yield from directions_files()
    yield from folders()


# --- files that are none


def special_files() -> Iterator[HostileBundle]:
    def replace(name: str, make: Callable[[Path], object]) -> Change:
        def change(folder: Path) -> None:
            (folder / name).unlink()
            make(folder / name)

        return change

    kinds: dict[str, Callable[[Path], object]] = {
        "missing": lambda path: None,
        "empty": lambda path: path.write_bytes(b""),
        "a folder": lambda path: path.mkdir(),
        "a pipe": lambda path: os.mkfifo(path),
        "a device without end": lambda path: path.symlink_to("/dev/zero"),
        "a device of noise": lambda path: path.symlink_to("/dev/urandom"),
        "a link to itself": lambda path: path.symlink_to(path.name),
        "a link to nothing": lambda path: path.symlink_to("/nonexistent/file"),
        "64 MiB of zeros": lambda path: path.write_bytes(bytes(2**26)),
        "a tebibyte of nothing": lambda path: (path.write_bytes(b""), os.truncate(path, 2**40)),
        "no UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x00 a: 1"),
    }
    for name in (ABOUT, CONFIG, WEIGHTS):
        for kind, make in kinds.items():
            yield HostileBundle(f"{name} is {kind}", replace(name, make), sealed=False)
    yield HostileBundle("config.yaml is a sealed pipe", sealed_special(lambda path: os.mkfifo(path)), sealed=False)
    yield HostileBundle("weights are a link to the same file", link_to_same, sound=True)


def sealed_special(make: Callable[[Path], object]) -> Change:
    """The file is replaced after its hash was taken."""

    def change(folder: Path) -> None:
        reseal(folder)
        (folder / CONFIG).unlink()
        make(folder / CONFIG)

    return change


def link_to_same(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "other.safetensors")
    (folder / WEIGHTS).symlink_to("other.safetensors")


def damaged_bytes() -> Iterator[HostileBundle]:
    """Cut files, and one flipped bit in each part of each."""

    def cut(name: str, keep: float) -> Change:
        def change(folder: Path) -> None:
            data = (folder / name).read_bytes()
            (folder / name).write_bytes(data[: int(len(data) * keep)])

        return change

    def flip(name: str, where: float) -> Change:
        def change(folder: Path) -> None:
            data = bytearray((folder / name).read_bytes())
            data[int((len(data) - 1) * where)] ^= 1
            (folder / name).write_bytes(bytes(data))

        return change

    for name in (ABOUT, CONFIG, WEIGHTS):
        for keep in (0.1, 0.5, 0.99):
            yield HostileBundle(f"{name} is cut to {keep:.0%}", cut(name, keep), sealed=False)
        for where in (0.0, 0.2, 0.4, 0.6, 0.8, 0.95):
            yield HostileBundle(f"a bit of {name} at {where:.0%} is flipped", flip(name, where), sealed=False)
    for keep in (0.1, 0.5, 0.99):
        yield HostileBundle(f"weights are cut to {keep:.0%}, and vouched for", cut(WEIGHTS, keep))


# --- bundle.json


def about(edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(folder: Path) -> None:
        found = json.loads((folder / ABOUT).read_text())
        edit(found)
        (folder / ABOUT).write_text(json.dumps(found))

    return change


def put(mapping: dict[str, Any], key: str, value: Any) -> None:
    mapping[key] = value


def about_fields() -> Iterator[HostileBundle]:
    fields = ("format", "dvae", "parts", "components", "sha256", "quantized")
    for field in fields:
        yield HostileBundle(f"bundle.json lacks {field}", about(lambda a, f=field: a.pop(f)), sound=None, sealed=False)
        for value in WRONG:
            if field == "components" and value == {}:
                continue  # who provides a component matters only if it is not registered
            if field in ("dvae",) and isinstance(value, str):
                continue
            yield HostileBundle(
                f"bundle.json: {field} is {str(value)[:30]!r}", about_sealed(field, value), sealed=False
            )
    for version in (0, 1, 3, 2.0, "2", 10**40):
        yield HostileBundle(f"format version {str(version)[:8]}", about_sealed("format", version), sealed=False)
    for value in ("", "0" * 64, 5):
        yield HostileBundle(
            f"self_sha256 is {value!r}", about(lambda a, v=value: put(a, "self_sha256", v)), sealed=False
        )
    texts = {
        "not JSON": "{",
        "a list": "[]",
        "text": '"x"',
        "null": "null",
        "a number": "7",
        "nested": "[" * 10**5,
        "a key twice": '{"format": 2, "format": 2}',
        "5000 digits": '{"format": ' + "9" * 5000 + "}",
        "NaN": '{"format": NaN}',
        "a huge text": '{"format": "' + "x" * 10**6 + '"}',
    }
    for name, text in texts.items():
        yield HostileBundle(f"bundle.json is {name}", lambda f, t=text: (f / ABOUT).write_text(t), sealed=False)
    yield HostileBundle(
        "a name in sha256 leads out", about(lambda a: put(a["sha256"], "../../x", "0" * 64)), sound=True
    )
    yield HostileBundle(
        "control characters in a component",
        about(lambda a: put(a["components"]["schedule"], "name", "\x1b[2J\nx")),
        sound=None,
    )


def about_sealed(field: str, value: Any) -> Change:
    def change(folder: Path) -> None:
        about(lambda a: put(a, field, value))(folder)
        with suppress(TypeError, KeyError, AttributeError):  # nothing to seal in it
            reseal(folder)

    return change


# --- config.yaml


def config_texts() -> Iterator[HostileBundle]:
    laughs = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
    )
    texts = {
        "a syntax error": "a: [",
        "a tab": "a:\n\t- b",
        "a key twice": "recipe: a\nrecipe: b\n",
        "a list": "[1, 2]",
        "text": "hello",
        "empty of values": "# nothing\n",
        "an alias": "a: &x 1\nb: *x\n",
        "a billion laughs": laughs,
        "a tag of Python": "recipe: !!python/object/apply:os.system ['touch PWNED']\n",
        "a tag of a path": "recipe: !!python/object/apply:pathlib.Path ['/etc/passwd']\n",
        "nested": "a: " + "[" * 5000,
        "long": "a: [" + "1, " * 60_000 + "]",
        "zero bytes": "a: \0\n",
        "number keys": "1: 2\n",
        "a merge key": "a: {<<: {b: 1}}\n",
        "5000 digits": f"seed: {'9' * 5000}\n",
        "hexadecimal nonsense": "seed: 0x_\n",
        "two documents": "a: 1\n---\nb: 2\n",
        "a directive": "%YAML 9.9\n---\na: 1\n",
    }
    for name, text in texts.items():
        yield HostileBundle(f"config.yaml is {name}", lambda f, t=text: (f / CONFIG).write_text(t))


def config(edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(folder: Path) -> None:
        found = yaml.safe_load((folder / CONFIG).read_text())
        edit(found)
        (folder / CONFIG).write_text(yaml.safe_dump(found, sort_keys=False))

    return change


def assign(dotted: str, value: Any) -> Change:
    """Set one field, by its dotted name."""

    def edit(found: dict[str, Any]) -> None:
        *path, last = dotted.split(".")
        node = found
        for name in path:
            node = node[name]
        node[last] = value

    return config(edit)


def config_fields() -> Iterator[HostileBundle]:
    fields = (
        "recipe",
        "image_size",
        "channels",
        "classes",
        "label",
        "seed",
        "precision",
        "encoder",
        "prior",
        "process",
        "schedule",
        "refiner",
        "sampler",
        "denoiser",
    )
    texts = ("recipe", "label")
    for field in fields:
        yield HostileBundle(f"config lacks {field}", config(lambda c, f=field: c.pop(f)))
        for value in WRONG:
            harmless = (field in texts and value == "x") or (field == "classes" and value == [])
            harmless = harmless or (field == "seed" and value in (-1,) and value is not True)
            yield HostileBundle(
                f"config: {field} is {str(value)[:30]!r}", assign(field, value), sound=None if harmless else False
            )
    sizes = [10**6, 10**9, 10**18, -1, 0, 0.5, float("nan"), float("inf"), "abc", [1], None, "${oc.env:WANDB_API_KEY}"]
    for field in ("refiner.width", "refiner.blocks", "encoder.latent_dim", "prior.components", "sampler.steps"):
        for value in sizes:
            yield HostileBundle(f"config: {field}={value}", assign(field, value))
    other = {
        "image_size": [0, -1, 5, 17, 10**6, 2.5],
        "channels": [0, 2, 4, 7, -1],
        "refiner.name": ["nope", "mlp", "dit", ""],
        "refiner.multipliers": [[], [0], [-1], [1] * 5000, [10**6], "x"],
        "refiner.attention_resolutions": [[10**6], "x"],
        "encoder.resolutions": [[], [1], [8, 8, 8], [10**6], [-1]],
        "encoder.channels": [[], [10**6] * 3, [1] * 10_001],
        "encoder.name": ["diffusers_kl", "kl_gan", "nope"],
        "schedule.name": ["nope", "../x", "constant"],
        "process.name": ["psld", "cld", "nope"],
        "sampler.name": ["nope", "sscs"],
        "prior.name": ["flow", "nope"],
        "denoiser.data_scale": [float("nan"), float("inf"), None, "x"],
        "denoiser.pca_components": [-1, 10**6, 4],
        "denoiser.space": ["latent", "x"],
        "denoiser.condition_label": [True, "maybe"],
        "precision": ["fp8", 32],
        "sampler.temperature": [float("nan"), float("inf"), "hot"],
        "sampler.threshold": ["x"],
        "crop": ["x"],
        "resize": [1],
        "denoiser.loss": [None, {"x": 1}, []],
        "classes": [["a"] * 9999, ["a", 1], [["a"]], ["x" * 2000]],
        "refiner.surplus": [1],
        "surplus": [1],
        "denoiser.surplus": [1],
        "schedule.min": [float("nan")],
    }
    may_work = {
        "image_size=17",
        "image_size=5",
        "denoiser.condition_label=True",
        "channels=4",
        "denoiser.data_scale=None",
    }
    for field, values in other.items():
        for value in values:
            name = f"{field}={value}"[:60]
            yield HostileBundle(f"config: {name}", assign(field, value), sound=None if name in may_work else False)


def config_extras(address: str) -> Iterator[HostileBundle]:
    """What bundles of the first format held, and what would run, send or import something."""
    command = "pipe:touch PWNED; false"
    old: dict[str, Any] = {
        "data": {"shards": command},
        "plugins": ["evil_module"],
        "tracking": {"wandb": {"mode": "online", "entity": "evil"}},
        "launcher": {"name": "slurm", "setup": ["touch PWNED"]},
        "source": {"name": "folder", "path": address},
        "encoder_weights": address,
        "teacher": f"{address}/x",
        "run": "/tmp",
        "hydra": {"run": {"dir": "/tmp"}},
        "defaults": [{"override /encoder": "x"}],
        "_target_": "os.system",
        "cache": {"folder": "/tmp"},
    }
    for field, value in old.items():
        for tool in ("sample", "reconstruct"):
            yield HostileBundle(f"config has {field}, for {tool}", assign(field, value), tool=tool)
    yield HostileBundle("reconstruct asks for its own images", lambda f: None, tool="reconstruct")
    values = [
        f"{address}/${{oc.env:WANDB_API_KEY}}",
        "${oc.env:WANDB_API_KEY}",
        "${oc.decode:${oc.env:WANDB_API_KEY}}",
        "${encoder}",
        "${.x}",
        "\\${oc.env:HOME}",
        "\\\\${oc.env:HOME}",
        "???",
        "${oc.create:{a: 1}}",
    ]
    for value in values:
        for field in ("recipe", "label", "encoder.name", "sampler.spacing"):
            yield HostileBundle(f"config: {field}={value}"[:70], assign(field, value))
    yield HostileBundle("a component of a package that is not here", foreign_component)
    yield HostileBundle("a component that says it is of a module", assign("schedule.name", "evil_module:x"))

    def folder_of_weights(found: dict[str, Any]) -> None:
        found["encoder"] = {"name": "diffusers_kl", "folder": "/etc"}

    yield HostileBundle("an encoder that names a folder", config(folder_of_weights))


def foreign_component(folder: Path) -> None:
    assign("schedule", {"name": "evil", "rate": 1.0})(folder)
    info = {"name": "evil", "cls": "evil_module.Evil", "package": "evil_module", "version": "6.6.6"}
    about(lambda a: put(a["components"], "schedule", info))(folder)


# --- weights


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        edit(found)
        save_file(found, folder / WEIGHTS)

    return change


def first(found: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(found) if found[name].ndim == 4)


def weights_files() -> Iterator[HostileBundle]:
    edits: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
        "hold NaN": lambda t: t[first(t)].view(-1)[0:1].fill_(float("nan")),
        "hold infinity": lambda t: t[first(t)].view(-1)[3:4].fill_(float("inf")),
        "are all NaN": lambda t: [value.fill_(float("nan")) for value in t.values() if value.is_floating_point()],
        "lack a tensor": lambda t: t.pop(first(t)),
        "have one more": lambda t: t.update({"denoiser.evil": torch.ones(2)}),
        "have a foreign part": lambda t: t.update({"evil.x": torch.ones(2)}),
        "have another shape": lambda t: t.update({first(t): torch.ones(1, 1, 1, 1)}),
        "have no dimensions": lambda t: t.update({first(t): torch.tensor(1.0)}),
        "have another type": lambda t: t.update({first(t): t[first(t)].to(torch.int8)}),
        "are empty": lambda t: t.clear(),
    }
    for name, edit in edits.items():
        sound = None if name == "have a foreign part" else False
        yield HostileBundle(f"weights {name}", tensors(edit), sound=sound)
    yield HostileBundle("weights in half precision", tensors(halve), sound=None)
    for name, data in headers().items():
        yield HostileBundle(f"weights: {name}", lambda f, d=data: (f / WEIGHTS).write_bytes(d))


def halve(found: dict[str, torch.Tensor]) -> None:
    for name, value in found.items():
        if value.is_floating_point():
            found[name] = value.half()


def header(entries: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def headers() -> dict[str, bytes]:
    def one(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": offsets}

    return {
        "a header of 2**63 bytes": header({}, length=2**63),
        "a header of 1 GiB": header({}, length=2**30),
        "a header that is no JSON": header(b"{nope"),
        "a header that is a list": header([]),
        "no header": b"\0" * 7,
        "a header nested deeply": header(b"[" * 10**5),
        "a key twice": header(b'{"a": 1, "a": 1}'),
        "a shape below zero": header({"a": one(shape=(-2,))}, bytes(8)),
        "a shape of 10**18": header({"a": one(shape=(10**18,))}, bytes(8)),
        "a shape of many sides": header({"a": one(shape=[1] * 2000 + [2])}, bytes(8)),
        "offsets beyond the file": header({"a": one(offsets=(0, 2**40))}, bytes(8)),
        "offsets below zero": header({"a": one(offsets=(-8, 0))}, bytes(8)),
        "offsets backwards": header({"a": one(offsets=(8, 0))}, bytes(8)),
        "tensors that overlap": header({"a": one(), "b": one(offsets=(4, 12))}, bytes(12)),
        "a hole": header({"a": one(), "b": one(offsets=(16, 24))}, bytes(24)),
        "an unknown type": header({"a": one("F8_E4M3", offsets=(0, 2))}, bytes(2)),
        "a type that is a list": header({"a": one([])}, bytes(8)),
        "an entry that is text": header({"a": "b"}),
        "metadata of lists": header({"__metadata__": {"a": []}}),
        "a name of a megabyte": header({"a" * 10**6: one()}, bytes(8)),
        "many names": header({f"n{i}": one(shape=(0,), offsets=(0, 0)) for i in range(60_000)}),
        "a pickle": b"\x80\x04cos\nsystem\n(S'touch PWNED'\ntR.",
        "a zip": b"PK\x03\x04" + bytes(100),
    }


# --- directions, and the folder itself


def directions_files() -> Iterator[HostileBundle]:
    told = {"unit": "", "attribute": "", "value": "", "share": None, "method": "pca", "name": "wide"}

    def write(
        vector: torch.Tensor, edit: Callable[[dict[str, str]], object] = lambda header: None, **more: Any
    ) -> Change:
        def change(folder: Path) -> None:
            from dvae.inference.directions.direction_files import encoder_hash

            head = {"encoder_sha256": encoder_hash(folder), "directions": json.dumps({"wide": told | more})}
            edit(head)
            save_file({"direction.wide": vector}, folder / DIRECTIONS, head)
            found = json.loads((folder / ABOUT).read_text())
            found["sha256"][DIRECTIONS] = ""
            (folder / ABOUT).write_text(json.dumps(found))

        return change

    whole = torch.linspace(-1, 1, 8)
    yield HostileBundle("directions that are sound", write(whole), sound=None, tool="edit")
    cases: dict[str, Change] = {
        "of another latent": write(torch.ones(9)),
        "of NaN": write(whole * float("nan")),
        "of whole numbers": write(whole.long()),
        "of no vector": write(whole, lambda h: put(h, "directions", "{}")),
        "of an unknown method": write(whole, method="evil"),
        "of a method that is a list": write(whole, method=[]),
        "without a unit": write(whole, unit=None),
        "of other weights": write(whole, lambda h: put(h, "encoder_sha256", "0" * 64)),
        "of a header that is no JSON": write(whole, lambda h: put(h, "directions", "{")),
        "of attributes that are none": write(whole, lambda h: put(h, "attributes", "[1]")),
        "of labels without tensors": write(whole, lambda h: put(h, "attributes", '{"a": ["b"]}'), method="labels"),
    }
    for name, change in cases.items():
        yield HostileBundle(f"directions {name}", change, tool="edit")
    yield HostileBundle("directions are a pipe", lambda f: os.mkfifo(f / DIRECTIONS), tool="edit", sealed=False)
    yield HostileBundle("directions without a hash", lambda f: save_file({}, f / DIRECTIONS), tool="edit", sealed=False)


def folders() -> Iterator[HostileBundle]:
    def become(make: Callable[[Path], object]) -> Change:
        def change(folder: Path) -> None:
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
            make(folder)

        return change

    yield HostileBundle("the bundle is a file", become(lambda p: p.write_text("x")), sealed=False)
    yield HostileBundle("the bundle is a pipe", become(lambda p: os.mkfifo(p)), sealed=False)
    yield HostileBundle("the bundle is empty", become(lambda p: p.mkdir()), sealed=False)
    yield HostileBundle("the bundle is a link to itself", become(lambda p: p.symlink_to(p.name)), sealed=False)
    yield HostileBundle("the bundle is a device", become(lambda p: p.symlink_to("/dev/zero")), sealed=False)
    yield HostileBundle("a bundle in the bundle", lambda f: (f / "bundle").mkdir(), sealed=False)


def noise(folder: Path, count: int = 4) -> None:
    """Images of noise to give to commands."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)
    np.save(folder / "images.npy", pixels)
