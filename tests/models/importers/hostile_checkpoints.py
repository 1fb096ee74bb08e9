"""Checkpoints that nobody should open: damaged, lying about themselves, or made to take all memory or time.

`hostile_checkpoints` yields a name and a function that writes the checkpoint to a path. The name begins with the layout
that the conversion should be asked for. None of them may end in anything but one line.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import struct
import tempfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from public_diffusevae import PublicUNet, PublicVAE, ddpm_state
from public_psld import PublicNCSNpp

Writer = Callable[[Path], object]
CHANNELS = {16: 8, 8: 16, 4: 16, 1: 24}
STRINGS = {
    "enc_block_str": "16x1,16d2,16t8,8d2,8t4,4x2,4d4,4t1,1x1",
    "dec_block_str": "1x2,1u4,1t4,4x1,4u2,4t8,8x2,8u2,8t16,16x1",
}
WORDS = {
    "diffusevae": ["from=diffusevae", "recipe=demo", "image_size=16"],
    "psld": [
        "from=psld",
        "recipe=demo",
        "image_size=16",
        "refiner=ncsnpp",
        "process=psld",
        "schedule=constant",
        "sampler=em",
    ],
}
"""Words of tools/convert.py for each layout, beside ckpt= and out=."""
DIGITS = "9" * 5000
"""A number that int() refuses."""
UNET, VAE, BETAS = "target_network.decoder.", "vae.", "online_network.betas"


STORAGES = {torch.float16: torch.HalfStorage, torch.float32: torch.FloatStorage, torch.float64: torch.DoubleStorage,
            torch.int64: torch.LongStorage}  # fmt: skip


class TensorStorage:
    """Unpickles as the persistent id ("storage", class, key, device, numel), or as any other `identity`."""

    def __init__(self, key: object, numel: object, kind: object = torch.FloatStorage, identity: object = None) -> None:
        self.identity = identity or ("storage", kind, key, "cpu", numel)


class Tensor:
    """Unpickles as torch's call that rebuilds a tensor, of whatever arguments."""

    def __init__(self, storage: object, offset: object, shape: object, stride: object) -> None:
        self.arguments = (storage, offset, shape, stride, False, OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.arguments


class Call:
    """Unpickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


class Pickler(pickle._Pickler):
    """Python's own pickler, which knows the storages above; lone surrogates pass."""

    def persistent_id(self, value: object) -> object:
        return value.identity if isinstance(value, TensorStorage) else None


def pickled(contents: object) -> bytes:
    data = io.BytesIO()
    Pickler(data, protocol=2).dump(contents)
    return data.getvalue()


def archive(path: Path, data: bytes, records: dict[str, bytes] | None = None, kind: int = zipfile.ZIP_STORED) -> Path:
    """An archive like torch's around a pickle; `kind` says how the pickle is compressed."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data, kind)
        for name, content in {"byteorder": b"little", **(records or {})}.items():
            file.writestr(f"archive/{name}", content)
    return path


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = np.cumprod([1, *shape[:0:-1]]).tolist()[::-1]
    return tuple(int(one) for one in strides[: len(shape)])


def claimed(shape: tuple[int, ...], key: str = "0", numel: int | None = None) -> Tensor:
    """A tensor of a shape that says that its storage has all the numbers."""
    count = int(np.prod(shape, dtype=object)) if numel is None else numel
    return Tensor(TensorStorage(key, count), 0, shape, contiguous(shape))


@functools.cache
def ddpm() -> dict[str, torch.Tensor]:
    """The state of a DDPM and its VAE that can be converted."""
    network = PublicUNet(32, [1, 1], 1, [], 1, z_dim=24)
    torch.nn.init.normal_(network.out[2].weight)
    return ddpm_state(network, network, PublicVAE(*STRINGS.values(), CHANNELS))


@functools.cache
def psld() -> dict[str, torch.Tensor]:
    """The state of a score network that can be converted."""
    network = PublicNCSNpp(6, 6, width=32, multipliers=[1], blocks=1, attended=[], side=16)
    return {f"ema_score_fn.{name}": value for name, value in network.state_dict().items()}


def saved(state: dict[Any, Any], shared: int = 0, **more: object) -> Writer:
    """Write a Lightning checkpoint of a state, whose entries may be tensors of torch or those above.

    The storage "0" has 64 numbers; "shared" has as many as it says.
    """

    def write(path: Path) -> None:
        held, records = {}, {}
        for number, (name, value) in enumerate(state.items()):
            if isinstance(value, torch.Tensor):
                records[f"data/n{number}"] = value.contiguous().numpy().tobytes()
                storage = TensorStorage(f"n{number}", value.numel(), STORAGES[value.dtype])
                value = Tensor(storage, 0, tuple(value.shape), contiguous(tuple(value.shape)))
            held[name] = value
        archive(
            path,
            pickled({"state_dict": held, **more}),
            {"data/0": bytes(4 * 64), "data/shared": bytes(4 * shared), **records},
        )

    return write


def changed(**changes: object) -> Writer:
    """The DDPM with other tensors, "__" for dots."""
    return saved(ddpm() | {name.replace("__", "."): value for name, value in changes.items()})


def tensor(value: object) -> Writer:
    """The DDPM with another tensor in the place of one."""
    return saved(ddpm() | {f"{UNET}out.0.weight": value})


def betas(value: object) -> Writer:
    return saved(ddpm() | {BETAS: value})


def contents(value: object) -> Writer:
    """An archive around any value."""
    return lambda path: archive(path, pickled(value))


def instructions(data: bytes) -> Writer:
    """An archive around any pickle, which begins with the mark of protocol 2."""
    return lambda path: archive(path, b"\x80\x02" + data)


def blocks(encoder: object, decoder: object = STRINGS["dec_block_str"]) -> Writer:
    """The DDPM with other block strings among its hyper-parameters."""
    return saved(ddpm(), hyper_parameters={"enc_block_str": encoder, "dec_block_str": decoder})


def bytes_of(write: Writer) -> bytes:
    """The file that a writer writes to a path of its own."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "file")
        return (Path(folder) / "file").read_bytes()


def one_storage(prefix: str, network: torch.nn.Module) -> dict[str, Tensor]:
    """All tensors of a network, made of the same numbers."""
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    count = max(int(np.prod(shape)) for shape in shapes.values())
    return {prefix + name: claimed(shape, "shared", count) for name, shape in shapes.items()}


def edited(change: Callable[[bytearray], object]) -> Writer:
    """A file that can be converted, after `change` of its bytes."""

    def write(path: Path) -> None:
        data = bytearray(bytes_of(saved(ddpm())))
        path.write_bytes(change(data) or data)

    return write


def cut(share: float) -> Writer:
    return edited(lambda data: data[: int(share * len(data))])


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def entry(name: bytes, size: int = 0, offset: int = 0, flags: int = 0, crc: int = 0, extra: bytes = b"") -> bytes:
    """A record in an archive's list of records."""
    return (
        struct.pack("<4s4B4HL2L5H2L", b"PK\x01\x02", 20, 3, 20, 0, flags, 0, 0, 0, crc, size, size, len(name),
                    len(extra), 0, 0, 0, 0, offset) + name + extra
    )  # fmt: skip


def listed(directory: bytes, before: bytes = b"", size: int | None = None, offset: int | None = None) -> Writer:
    """An archive of a list of records, and whatever lies before it."""
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(directory) if size is None else size,
                      len(before) if offset is None else offset, 0)  # fmt: skip
    return lambda path: path.write_bytes(before + directory + end)


def local(name: bytes, data: bytes) -> bytes:
    """A record of an archive with the header before it."""
    return struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 0, 0, 0, zlib.crc32(data), len(data), len(data), len(name),
                       0) + name + data  # fmt: skip


def sparse_pickle(path: Path) -> None:
    """A data.pkl of 300 MB that takes no room on the disk."""
    name, size = b"archive/data.pkl", 300 * 2**20
    head = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, size, size, len(name), 0) + name
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + size)
        file.seek(0, os.SEEK_END)
        directory = entry(name, size)
        file.write(directory)
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(directory), len(head) + size, 0))


def overlapping(path: Path) -> None:
    """Records that lie over each other: a megabyte that is told to be a gigabyte."""
    data, name = bytes(2**20), b"archive/data.pkl"
    directory = entry(name, 2**20, crc=zlib.crc32(data))
    directory += b"".join(entry(b"archive/data/%d" % n, 2**20, crc=zlib.crc32(data)) for n in range(1000))
    listed(directory, local(name, data))(path)


def nested(opening: bytes, closing: bytes, depth: int) -> bytes:
    return opening * depth + b"N" + closing * depth


def shared_nest(depth: int = 200) -> bytes:
    """A tuple of a tuple twice, of a tuple twice, ...: 2^depth leaves."""
    return b")q\x00" + b"h\x00h\x00\x86q\x00" * depth


def files() -> Iterator[tuple[str, Writer]]:
    """Things at the path that are no checkpoint at all."""
    yield "diffusevae: nothing there", lambda path: None
    yield "diffusevae: empty", lambda path: path.write_bytes(b"")
    yield "diffusevae: text", lambda path: path.write_text("hello")
    yield "diffusevae: a folder", lambda path: path.mkdir()
    yield "diffusevae: a pipe", lambda path: os.mkfifo(path)
    yield "diffusevae: a device", lambda path: path.symlink_to("/dev/zero")
    yield "diffusevae: a link to itself", lambda path: path.symlink_to(path)
    yield "diffusevae: a link to nothing", lambda path: path.symlink_to(path.with_name("gone"))
    yield "diffusevae: the old format", lambda path: path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
    yield "diffusevae: another archive", lambda path: path.write_bytes(b"PK\x03\x04" + bytes(1000))
    for share in (0.01, 0.5, 0.9, 0.9999):
        yield f"diffusevae: cut off after {share:.2%}", cut(share)


def archives() -> Iterator[tuple[str, Writer]]:
    """Archives that lie about their records."""

    def duplicate(path: Path) -> None:
        path.write_bytes(bytes_of(saved(ddpm())))
        with zipfile.ZipFile(path, "a") as file:
            file.NameToInfo.clear()  # else it warns
            file.writestr("archive/data.pkl", pickled({}))

    whole = pickled({"state_dict": {"w": claimed((2,))}})
    name = b"archive/data.pkl"
    yield "diffusevae: no pickle", lambda path: zipfile.ZipFile(path, "w").writestr("archive/version", "3")
    yield "diffusevae: a pickle twice", duplicate
    yield "diffusevae: two pickles", lambda path: archive(path, whole, {"more/data.pkl": whole})
    yield "diffusevae: a pickle of 64 MB of zeros, compressed", lambda p: archive(p, bytes(2**26), kind=8)
    yield "diffusevae: a pickle compressed by lzma", lambda p: archive(p, whole, kind=14)
    yield "diffusevae: a pickle compressed by bzip2", lambda p: archive(p, whole, kind=12)
    yield "diffusevae: a storage of zeros, compressed", lambda p: _with_storage(p, bytes(2**26), 8)
    yield "diffusevae: a storage that is missing", saved(ddpm() | {f"{UNET}out.0.weight": claimed((32,), "gone")})
    yield "diffusevae: a storage that is too short", tensor(claimed((32,), numel=65))
    yield "diffusevae: a storage that is too long", tensor(claimed((32,), numel=63))
    yield "diffusevae: a pickle of 300 MB", sparse_pickle
    yield "diffusevae: records over each other", overlapping
    yield "diffusevae: a wrong checksum", listed(entry(name, len(whole), crc=1), local(name, whole))
    yield "diffusevae: a size of 4 GB", listed(entry(name, 2**32 - 2), local(name, whole))
    large = struct.pack("<2H3Q", 1, 24, 2**63, 2**63, 0)
    yield "diffusevae: a size of 2^63", listed(entry(name, 2**32 - 1, extra=large), local(name, whole))
    yield "diffusevae: a short field of zip64", listed(entry(name, 2**32 - 1, extra=large[:9]), local(name, whole))
    yield "diffusevae: an offset beyond", listed(entry(name, len(whole), 2**31), local(name, whole))
    yield "diffusevae: encrypted", listed(entry(name, 9, flags=1), local(name, whole))
    yield "diffusevae: a name that is no UTF-8", listed(entry(b"\xff\xfe", 9, flags=0x800), local(name, whole))
    yield "diffusevae: names of control characters", listed(entry(b"\x1b[31m\n/data.pkl") * 2, local(name, whole))
    yield "diffusevae: 100 000 records", listed(b"".join(entry(b"%d" % n) for n in range(100_000)))
    yield "diffusevae: 300 000 records", listed(b"".join(entry(b"") for n in range(300_000)))
    yield "diffusevae: a list of records of 4 GB", listed(entry(name), local(name, whole), size=2**32 - 2)
    yield "diffusevae: a list of records before the file", listed(entry(name), offset=2**31)
    yield "diffusevae: big-endian", lambda path: archive(path, whole, {"byteorder": b"big"})
    yield "diffusevae: an order of bytes of 64 MB", lambda path: archive(path, whole, {"byteorder": bytes(2**26)})
    yield "diffusevae: flipped bits", edited(lambda data: data.__setitem__(slice(3000, 3100), bytes(100)))


def _with_storage(path: Path, data: bytes, kind: int) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled({"state_dict": {f"{UNET}out.2.weight": claimed((2**18, 64))}}))
        file.writestr("archive/data/0", data, kind)


def pickles() -> Iterator[tuple[str, Writer]]:
    """Pickles that make no sense, or no end."""
    yield "diffusevae: no end", instructions(b"}")
    yield "diffusevae: nothing", instructions(b".")
    yield "diffusevae: noise", lambda path: archive(path, np.random.default_rng(0).bytes(10_000))
    for protocol in (0, 1):
        data = pickle.dumps({"state_dict": {"w": [1, 2.5, "a", None]}}, protocol)
        yield f"diffusevae: protocol {protocol}", lambda path, data=data: archive(path, data)
    yield "diffusevae: a number of 5000 digits", instructions(f"L{DIGITS}L\n.".encode())
    yield "diffusevae: a number of 5000 digits, as INT", instructions(f"I{DIGITS}\n.".encode())
    yield "diffusevae: a float of 1 MB", instructions(b"F" + b"x" * 2**20 + b"\n.")
    yield "diffusevae: a key of 5000 digits", contents({"state_dict": {int("9" * 4000) ** 2: 1}})
    yield "diffusevae: no UTF-8", instructions(b"X\x02\x00\x00\x00\xff\xfe.")
    yield "diffusevae: a text of 4 GB", instructions(b"X\xff\xff\xff\xffabc.")
    yield "diffusevae: a text of 2^62", instructions(b"\x8d" + struct.pack("<Q", 2**62) + b"abc.")
    yield "diffusevae: a huge memo number", instructions(b"}r\xff\xff\xff\xff.")
    yield "diffusevae: an empty memo", instructions(b"h\x05.")
    yield "diffusevae: a list in itself", instructions(b"]q\x00h\x00a.")
    yield "diffusevae: a state in itself", instructions(b"}q\x00" + text("state_dict") + b"h\x00s.")
    deep = {"}": nested(b"}" + text("a"), b"s", 150_000), "]": nested(b"]", b"a", 500_000), ")": b")" + b"\x85" * 10**6}
    for kind, data in deep.items():
        yield f"diffusevae: nested 100 000 times, {kind}", instructions(data + b".")
    as_state = b"}" + text("state_dict")
    yield "diffusevae: a nest with 2^200 leaves", instructions(as_state + shared_nest() + b"s.")
    yield "diffusevae: such a nest as a key", instructions(as_state + b"}" + shared_nest() + b"K\x01ss.")
    yield "diffusevae: such a nest as the name of a class", instructions(shared_nest() + text("b") + b"\x93)R.")
    yield "diffusevae: a class named by numbers", instructions(b"K\x01K\x02\x93)R.")
    long = text("a" * 2**20)
    yield "diffusevae: names of classes of 1 MB", instructions(long + b"q\x00" + b"h\x00h\x00\x93" * 200_000 + b".")
    pairs = (
        b"cnumpy\nndarray\nq\x01](" + b"K\x01K\x02\x86" * 100_000 + b"eq\x00\x85q\x020ccollections\nOrderedDict\nq\x03"
    )
    yield "diffusevae: a list for many mappings", instructions(pairs + b"h\x03h\x02R" * 100_000 + b".")
    keys = b"".join(b"\x8a\x09" + (k * (2**61 - 1)).to_bytes(9, "little") + b"N" for k in range(1, 120))
    many = b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(1, 100_000))
    yield "diffusevae: keys that collide", instructions(b"}(" + keys + many + b"u.")
    same = text("a" * 2**22)
    again = b"}q\x02" + same + b"q\x00Ns" + same + b"q\x01Ns" + b"h\x01Ns" * 200_000
    yield "diffusevae: equal keys of 4 MB", instructions(again + b".")
    yield "diffusevae: 30 MB of instructions", lambda path: archive(path, b"\x80\x02" + b"}" * (30 * 2**20))
    yield "diffusevae: marks alone", lambda path: archive(path, b"\x80\x02" + b"(" * (30 * 2**20))
    yield "diffusevae: extensions of copyreg", instructions(b"\x82\x01.")
    yield "diffusevae: os.system", contents({"state_dict": Call(os.system, "true")})
    yield "diffusevae: eval in the hyper-parameters", saved(ddpm(), hyper_parameters=Call(eval, "1"))
    yield "diffusevae: torch.load in a tensor", tensor(Call(torch.load, "elsewhere"))
    yield "diffusevae: a call of 1 MB", instructions(b"c" + b"a" * 2**20 + b"\nB\n)R.")


def tensors() -> Iterator[tuple[str, Writer]]:
    """Tensors that are none, or lie where nothing is."""
    identities: list[Any] = [
        5, None, "archive", (), ("storage",), ("storage", torch.FloatStorage, 5, "cpu", 64),
        ("storage", "FloatStorage", "0", "cpu", 64), ("storage", torch.FloatStorage, "0", None, 64),
        ("storage", torch.FloatStorage, "0", "cpu", "64"), ("storage", os.system, "0", "cpu", 64),
        ("storage", torch.ComplexFloatStorage, "0", "cpu", 64), ("module", torch.FloatStorage, "0", "cpu", 64),
        [1, 2],
    ]  # fmt: skip
    for identity in identities:
        storage = TensorStorage("0", 64, identity=identity or (identity,))
        yield f"diffusevae: a storage that is {str(identity)[:60]}", tensor(Tensor(storage, 0, (32,), (1,)))
    for numel in (-1, 0, 2**40, 2**63, 2**64, 10**5000, True, 2.5, "64"):
        size = "10^5000" if numel == 10**5000 else repr(numel)
        yield f"diffusevae: a storage of {size} numbers", tensor(Tensor(TensorStorage("0", numel), 0, (32,), (1,)))
    places: list[tuple[Any, Any, Any]] = [
        (-1, (32,), (1,)), (33, (32,), (1,)), (10**5000, (32,), (1,)), (2**63, (32,), (1,)), (None, (32,), (1,)),
        (0, (65,), (1,)), (0, (32,), (3,)), (0, (32,), (-1,)), (0, (1,), (10**5000,)),
        (0, (1,), (2**63,)), (0, (32, 1), (1,)), (0, (32,), ()), (0, (), ()), (0, (0,), (1,)), (0, (0, 2**62), (1, 1)),
        (0, (2**40,), (0,)), (0, (2**31, 2**31), (0, 0)), (0, ("32",), (1,)), (0, (True,), (1,)), (0, (-32,), (1,)),
        (0, [32], [1]), (0, (1,) * 9, (1,) * 9), (0, (1,) * 10_000, (1,) * 10_000), (0, (32.0,), (1,)),
    ]  # fmt: skip
    for number, place in enumerate(places):
        yield f"diffusevae: a tensor in a wrong place, {number}", tensor(Tensor(TensorStorage("0", 64), *place))
    yield "diffusevae: a tensor of no storage", tensor(Tensor("storage", 0, (32,), (1,)))
    yield "diffusevae: a tensor that is a list", tensor([0.0] * 32)
    yield "diffusevae: a key with a path", tensor(Tensor(TensorStorage("../../data.pkl", 64), 0, (32,), (1,)))
    yield "diffusevae: whole numbers", tensor(torch.ones(32, dtype=torch.int64))
    yield "diffusevae: NaN", tensor(torch.full((32,), float("nan")))
    yield "diffusevae: infinity", tensor(torch.full((32,), float("inf")))
    yield "diffusevae: infinity in half precision", tensor(torch.full((32,), float("-inf"), dtype=torch.float16))
    yield "diffusevae: zeros for the last layer", saved(ddpm() | {f"{UNET}out.2.weight": torch.zeros(3, 32, 3, 3)})
    states: list[Any] = [None, 5, "a", [], {}, (), {"w": 5}, {5: claimed((2,))}, {None: claimed((2,))}, [claimed((2,))],
                         {"w": claimed}, claimed((2,)), {b"w": claimed((2,))}]  # fmt: skip
    for number, state in enumerate(states):
        yield f"diffusevae: a state of the wrong kind, {number}", contents({"state_dict": state})
    yield "diffusevae: no mapping", contents([claimed((2,))])
    yield "diffusevae: no state", contents({"model": {"w": claimed((2,))}})
    names = {"control characters": "a\x1b[31m\nb", "a lone surrogate": "\ud800", "a NUL": "a\0b", "1 MB": "a" * 2**20,
             "4000 letters": "a" * 4000, "right-to-left": "a\u202eb"}  # fmt: skip
    for kind, name in names.items():
        yield f"diffusevae: a name of {kind}", saved(ddpm() | {UNET + name: torch.ones(2)})
    yield "diffusevae: 50 000 tensors", saved({f"{UNET}w{n}": claimed((2,)) for n in range(50_000)})


def layouts() -> Iterator[tuple[str, Writer]]:
    """Whole files whose networks or settings are none."""
    numbers = torch.linspace(1e-4, 0.02, 1000).double()
    for kind, value in {
        "a number": torch.tensor(0.1).double(), "a matrix": numbers.view(10, 100), "whole": torch.arange(1000),
        "NaN": numbers * float("nan"), "infinite": numbers / 0, "zero": 0 * numbers, "negative": -numbers,
        "falling": numbers.flip(0), "above 1": 100 * numbers, "uneven": numbers**2, "a million": torch.ones(10**6),
        "a list": [0.1], "claimed": claimed((2**20,), numel=2**30),
    }.items():  # fmt: skip
        yield f"diffusevae: betas that are {kind}", betas(value)
    stem = f"{UNET}input_blocks.0.0.weight"
    yield "diffusevae: a width of 10^9", saved(ddpm() | {stem: claimed((10**9, 6, 3, 3))})
    yield "diffusevae: a width of 10^6", saved(ddpm() | {stem: claimed((2**20, 6, 3, 3))})
    yield "diffusevae: a width of 33", saved(ddpm() | {stem: torch.ones(33, 6, 3, 3)})
    yield "diffusevae: a wrong rank", saved(ddpm() | {stem: torch.ones(32, 6)})
    yield "diffusevae: 10^6 channels", saved(ddpm() | {stem: claimed((32, 10**6, 3, 3))})
    down, block = f"{UNET}input_blocks.{{}}.0.op.weight", f"{UNET}input_blocks.{{}}.0.in_layers.2.weight"
    levels = {down.format(n): torch.ones(1) for n in range(2, 9000)}
    yield "diffusevae: 9000 levels", saved(ddpm() | levels)
    many = {block.format(n): claimed((32, 32, 3, 3)) for n in range(1, 9000)}
    yield "diffusevae: 9000 blocks", saved(ddpm() | many)
    others = {name: value for name, value in ddpm().items() if not name.startswith(UNET)}
    with torch.device("meta"):
        deep = PublicUNet(32, [1], 375, [], 1, z_dim=24)
    yield (
        "diffusevae: 375 blocks of the same numbers",
        saved(others | one_storage(UNET, deep) | {f"{UNET}out.2.weight": torch.ones(3, 32, 3, 3)}, shared=64 * 32 * 9),
    )
    latent = claimed((2**20, 2**19), "shared", 2**39)
    yield "diffusevae: a latent of 10^6", saved(ddpm() | {f"{UNET}proj.0.weight": latent})
    yield "diffusevae: the VAE alone", saved({name[4:]: value for name, value in ddpm().items() if name[:4] == VAE})
    yield "diffusevae: no VAE", saved({name: value for name, value in ddpm().items() if name[:4] != VAE})
    layer = f"{VAE}enc.block_mod.{{}}.weight"
    for number in ("7" * 5000, "7" * 250, "9999999", "٣"):
        wrong = {layer.format(number): torch.ones(8, 8, 1, 1)}
        yield f"diffusevae: a layer of the VAE with a number of {len(number)} digits", saved(ddpm() | wrong)
    yield "diffusevae: a VAE's layer of a wrong rank", saved(ddpm() | {layer.format(2): torch.ones(8)})
    more = {layer.format(n): claimed((8, 8, 1, 1)) for n in range(10, 9000)}
    yield "diffusevae: a VAE of 9000 resolutions", saved(ddpm() | more)
    yield "diffusevae: a surplus tensor", saved(ddpm() | {"surprise.weight": torch.ones(3)})
    yield from _strings()
    yield from _scores()


def _strings() -> Iterator[tuple[str, Writer]]:
    """Block strings of a VAE."""
    for kind, word in {
        "10 000 times 10 000 blocks": ",".join(["16x10000"] * 1000), "a number of 5000 digits": f"16x{DIGITS}",
        "a resolution of 5000 digits": f"{DIGITS}x1", "5 million entries": "8," * 2_500_000,
        "no blocks, again and again": "8x0," * 2000, "a million blocks": "16x999999,16d2,16t8,8d2,8t4,4x2,4d4,4t1,1x1",
        "resolution zero": "16x1,16d2,16t8,8d2,8t4,4x2,4d4,4t0,0x1", "nothing": "", "commas": ",,,,",
        "noise": "x\0\ud800", "other digits": "١٦x1,16d2",
        "a negative number": "16x-1,16d2,16t8,8d2,8t4,4x2,4d4,4t1,1x1",
    }.items():  # fmt: skip
        yield f"diffusevae: a block string of {kind}", blocks(word)
        yield f"diffusevae: a block string of {kind}, decoder", blocks(STRINGS["enc_block_str"], word)


def _scores() -> Iterator[tuple[str, Writer]]:
    """Score networks of PSLD."""
    start = "ema_score_fn.all_modules."
    for number in ("7" * 5000, "7" * 250, "9999999", "٣", "", "-1", "1e3"):
        yield (
            f"psld: a module {number[:8]!r}, {len(number)} digits",
            saved(psld() | {f"{start}{number}.weight": torch.ones(2)}),
        )
    yield "psld: a classifier", saved({"clf_fn.all_modules.0.weight": torch.ones(2)})
    yield "psld: other tensors", saved({"model.weight": torch.ones(2)})
    yield "psld: a DDPM", saved(ddpm())
    yield "psld: a module of a wrong rank", saved(psld() | {f"{start}2.weight": torch.ones(2)})
    yield "psld: a width of 10^6", saved(psld() | {f"{start}2.weight": claimed((2**20, 6, 3, 3))})
    with torch.device("meta"):
        deep = PublicNCSNpp(6, 6, width=32, multipliers=[1], blocks=300, attended=[], side=16)
    last = f"{start}{len(deep.all_modules) - 1}.weight"
    yield (
        "psld: 300 blocks of the same numbers",
        saved(one_storage("ema_score_fn.", deep) | {last: torch.ones(6, 32, 3, 3)}, shared=64 * 32 * 9),
    )
    one = claimed((32, 32, 3, 3))
    halves = {f"{start}{n}.{name}": one for n in range(3, 4000)
              for name in ("Conv_0.weight", "GroupNorm_1.weight", "Conv_2.weight")}  # fmt: skip
    yield "psld: 4000 levels", saved(psld() | halves)
    yield "psld: NaN", saved(psld() | {f"{start}1.bias": torch.full((128,), float("nan"))})
    yield "psld: infinity", saved(psld() | {f"{start}1.bias": torch.full((128,), float("inf"))})


def hostile_checkpoints() -> Iterator[tuple[str, Writer]]:
    """Name, and function that writes the checkpoint; the name begins with a key of `WORDS`."""
    yield from files()
    yield from archives()
    yield from pickles()
    yield from tensors()
    yield from layouts()
