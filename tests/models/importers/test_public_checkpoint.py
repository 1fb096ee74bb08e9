from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import lightning_files
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dvae.errors import UserError
from dvae.models.importers import unpickle
from dvae.models.importers.checkpoint_file import Checkpoint

STRINGS = {"enc_block_str": "8x1", "sizes": [1, 2]}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    base = torch.arange(24, dtype=torch.float32).view(4, 6)
    return {
        "plain": torch.randn(3, 2, 5),
        "view": base[1:3, ::2],
        "transposed": base.t(),
        "scalar": torch.tensor(4.0),
        "half": torch.randn(5).half(),
        "bfloat": torch.randn(5).bfloat16(),
        "double": torch.linspace(0, 1, 7, dtype=torch.float64),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }


@pytest.fixture(scope="module")
def whole(state, tmp_path_factory) -> Path:
    return lightning_files.save(tmp_path_factory.mktemp("whole") / "model.ckpt", state, STRINGS)


def opened(path: Path) -> Checkpoint:
    """The checkpoint with every tensor read."""
    with Checkpoint(path) as checkpoint:
        for tensor in checkpoint.state().values():
            tensor.load()
        return checkpoint


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        opened(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def test_tensors_are_those_that_were_saved(whole, state):
    with Checkpoint(whole) as checkpoint:
        read = {name: tensor.load() for name, tensor in checkpoint.state().items()}
        assert checkpoint.settings() == STRINGS
    assert read.keys() == state.keys()
    for name, value in state.items():
        kept = torch.float64 if name == "double" else torch.float32
        torch.testing.assert_close(read[name], value.detach().to(kept), atol=0, rtol=0)


def test_the_rest_of_a_lightning_file_is_inert(whole):
    with pytest.raises(pickle.UnpicklingError):  # why torch's own careful reader is not enough
        torch.load(whole, weights_only=True)
    contents = opened(whole).contents
    (callback,) = contents["callbacks"]
    assert callback == unpickle.PickledName("pytorch_lightning.Callback")
    assert contents["callbacks"][callback]["dirpath"].kind == "pathlib.PosixPath"
    assert contents["loops"]["fit_loop"].state == {"progress": {"total": 3}}
    assert contents["config"].kind == "omegaconf.dictconfig.DictConfig"
    assert contents["optimizer_states"][0]["param_groups"] == [{"lr": 2e-4, "params": [0]}]


def test_hyper_parameters_of_any_kind(tmp_path):
    torch.save({"hyper_parameters": dict(STRINGS)}, tmp_path / "a")
    assert Checkpoint(tmp_path / "a").settings() == STRINGS
    torch.save({"hyper_parameters": OmegaConf.create(STRINGS)}, tmp_path / "b")
    assert "enc_block_str" not in Checkpoint(tmp_path / "b").settings()  # nested in nodes of omegaconf
    torch.save({"x": 1}, tmp_path / "c")
    assert Checkpoint(tmp_path / "c").settings() == {}


class Call:
    """Unpickles as a call of `function`."""

    def __init__(self, function, *arguments) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def instruction(function: str, argument: str, kind: str) -> bytes:
    """A pickle that calls module.function(argument) by one of pickle's other instructions."""
    module, _, name = function.rpartition(".")
    text = f"V{argument}\n".encode()
    match kind:
        case "INST":
            return b"(" + text + f"i{module}\n{name}\n.".encode()
        case "OBJ":
            return b"(c" + f"{module}\n{name}\n".encode() + text + b"o."
    return (
        b"\x80\x04"
        + b"".join(b"\x8c" + bytes([len(s)]) + s.encode() for s in (module, name))
        + b"\x93("
        + text
        + b"tR."
    )


def archive(path: Path, data: bytes) -> Path:
    """A file like torch's, around a pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
    return path


def attacks(mark: Path) -> dict[str, bytes]:
    """Pickles that make the file `mark` where they are executed."""
    code = f"open({str(mark)!r}, 'w').close()"
    shell = f"touch {mark}"
    inner = io.BytesIO()
    torch.save(Call(os.system, shell), inner)

    def saved(value: object) -> bytes:
        return pickle.dumps({"state_dict": {"w": value}}, protocol=2)

    return {
        "os.system": saved(Call(os.system, shell)),
        "eval": saved(Call(eval, code)),
        "exec": saved(Call(exec, code)),
        "in hyper_parameters": pickle.dumps({"hyper_parameters": Call(os.system, shell)}, protocol=2),
        "newest protocol": pickle.dumps({"state_dict": Call(os.system, shell)}, protocol=5),
        "a tensor inside": saved(Call(torch.storage._load_from_bytes, inner.getvalue())),
        "by INST": instruction("posix.system", shell, "INST"),
        "by OBJ": instruction("posix.system", shell, "OBJ"),
        "by STACK_GLOBAL": instruction("posix.system", shell, "STACK_GLOBAL"),
    }


@pytest.mark.parametrize("name", attacks(Path("mark")))
def test_code_is_refused_and_does_not_run(tmp_path, name):
    data = attacks(tmp_path / "ran")[name]
    path = archive(tmp_path / "evil.ckpt", data)
    message = refused(path)
    assert not (tmp_path / "ran").exists()
    assert "refused, and nothing in it was run" in message or "is in no checkpoint of torch" in message
    pickle.loads(data)  # the attack is a real one
    assert (tmp_path / "ran").exists()


def test_a_nested_torch_load_is_refused(tmp_path):
    torch.save({"state_dict": {"w": Call(torch.load, "elsewhere.pt")}}, tmp_path / "evil.ckpt")
    assert "calls 'torch.serialization.load'" in refused(tmp_path / "evil.ckpt")


def test_an_object_that_runs_code_when_its_state_is_set_stays_data(tmp_path):
    class Trap:
        def __setstate__(self, state: dict) -> None:
            raise AssertionError("ran")

    Trap.__module__, Trap.__qualname__ = "lightning_files", "Trap"
    lightning_files.Trap = Trap
    try:
        trap = Trap()
        trap.word = "x"
        data = pickle.dumps({"state_dict": {}, "callbacks": trap}, protocol=2)
        with pytest.raises(AssertionError, match="ran"):
            pickle.loads(data)
        callbacks = Checkpoint(archive(tmp_path / "trap.ckpt", data)).contents["callbacks"]
    finally:
        del lightning_files.Trap
    assert (callbacks.kind, callbacks.state) == ("lightning_files.Trap", {"word": "x"})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02",
        b"garbage",
        b"\x80\x02}",  # no end
        b"\x80\x02.",  # nothing on the stack
        b"\x80\x02h\x05.",  # from an empty memo
        b"\x80\x02K\x01K\x02\x86R.",  # calls a number
        b"\x80\x02)s.",  # sets items of nothing
        b"\x80\x02}]K\x01s.",  # a list for a key
        b"\x80\x02))\x86)\x86}K\x01K\x02s.",
        b"\x80\x02(X\x01\x00\x00\x00atQ.",  # an identity that is no storage's
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.",  # bytes without end
        b"\x80\x02\x82\x01.",  # copyreg's extensions
    ],
)
def test_nonsense_is_one_line(tmp_path, data):
    refused(archive(tmp_path / "bad.ckpt", data))


def test_a_huge_memo_number_takes_no_memory(tmp_path):
    data = b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b"."
    assert Checkpoint(archive(tmp_path / "memo.ckpt", data)).contents == {}


def rewritten(whole: Path, path: Path, change) -> Path:
    """The archive with `change(name, data)` in place of each record; a tuple says the compression too."""
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            made = change(name.partition("/")[2], old.read(name))
            if made is not None:
                data, compression = made if isinstance(made, tuple) else (made, zipfile.ZIP_STORED)
                new.writestr(name, data, compression)
    return path


def test_records_that_do_not_match_their_tensors(whole, tmp_path):
    path = tmp_path / "bad.ckpt"

    def first(change):
        return rewritten(whole, path, lambda name, data: change(data) if name == "data/0" else data)

    assert "'data/0' has 240 bytes (plain), by the rest of the file it should have 120" in refused(
        first(lambda d: d * 2)
    )
    assert "'data/0' has 116 bytes" in refused(first(lambda d: d[:-4]))
    assert "'data/0' is missing" in refused(first(lambda d: None))
    assert "(compressed)" in refused(first(lambda d: (d, zipfile.ZIP_DEFLATED)))
    bomb = rewritten(whole, path, lambda n, d: (bytes(2**24), zipfile.ZIP_DEFLATED) if n == "data.pkl" else d)
    assert "'data.pkl' has 16777216 bytes (compressed)" in refused(bomb)
    assert "big-endian" in refused(rewritten(whole, path, lambda n, d: b"big" if n == "byteorder" else d))


def test_flipped_bits_are_found(whole, tmp_path):
    data = bytearray(whole.read_bytes())
    with zipfile.ZipFile(whole) as file:
        record = next(info for info in file.infolist() if info.filename.endswith("/data/0"))
    start = data.rindex(b"PK\x03\x04", 0, record.header_offset + 4)
    name_length, extra_length = struct.unpack_from("<HH", data, start + 26)
    data[start + 30 + name_length + extra_length + 5] ^= 1
    (tmp_path / "flipped.ckpt").write_bytes(data)
    assert "is damaged" in refused(tmp_path / "flipped.ckpt")


def test_two_records_of_one_name(whole, tmp_path):
    path = tmp_path / "twice.ckpt"
    path.write_bytes(whole.read_bytes())
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as file:
        file.writestr(file.namelist()[0], b"other")
    assert "is there more than once" in refused(path)


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [(0, (7,), (1,)), (3, (4,), (1,)), (0, (2, 2), (5, 1)), (-1, (2,), (1,)), (0, (9, 9), (0, 0)), (0, ("a",), (1,)),
     (0, (2,), (1, 1)), (0, (0,), (1,)), (0, (2**50,), (0,)), (0, (2, 2), (-1, 1)), (0, (True,), (1,))],
)  # fmt: skip
def test_tensors_that_reach_beyond_their_record(offset, shape, stride):
    storage = unpickle.TensorStorage(torch.float32, "0", 6)
    assert not unpickle.TensorRef(storage, offset, shape, stride).within()
    assert unpickle.TensorRef(storage, 1, (2, 2), (2, 1)).within()


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "file"
    assert "No such file" in refused(path)
    path.mkdir()
    assert "is a folder, not a file" in refused(path)
    path = tmp_path / "text"
    path.write_text("hello")
    assert "no zip archive" in refused(path)
    torch.save({"state_dict": {}}, path, _use_new_zipfile_serialization=False)
    assert "torch before 1.6" in refused(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme", "x")
    assert "not one of torch.save" in refused(path)
    torch.save([1, 2], path)
    assert "no 'state_dict'" in refused(path)
    torch.save({"state_dict": {"w": 3}}, path)
    assert "state_dict['w'] is not a tensor" in refused(path)
    torch.save({"state_dict": {"w": torch.arange(3)}}, path)
    assert "not real numbers" in refused(path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(whole, tmp_path, share):
    data = whole.read_bytes()
    path = tmp_path / "cut.ckpt"
    path.write_bytes(data[: int(share * len(data))])
    assert ("cut off" if share else "the file is empty") in refused(path)


def outcome(attempt: Callable[[], object]) -> str:
    """The message that a user gets, or nothing; any other exception is a failure."""
    try:
        attempt()
    except UserError as error:
        return str(error)
    return ""


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_is_a_line_or_without_effect(whole, tmp_path_factory, data):
    raw = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.ckpt"
    path.write_bytes(raw)
    assert "\n" not in outcome(lambda: opened(path))


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")  # of a text literal, in pickletools
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_change_of_the_pickle_is_a_line_or_without_effect(whole, data):
    with zipfile.ZipFile(whole) as file:
        raw = bytearray(file.read(next(name for name in file.namelist() if name.endswith("data.pkl"))))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    assert "\n" not in outcome(lambda: unpickle.read(bytes(raw), "file"))
