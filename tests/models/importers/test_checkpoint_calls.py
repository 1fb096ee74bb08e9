"""What the pickles of checkpoints call: values are data, code is refused by name, the unknown is not accused."""

from __future__ import annotations

import argparse
import builtins
import collections
import datetime
import decimal
import enum
import fractions
import functools
import importlib
import operator
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import threading
import types
import uuid
from pathlib import Path

import lightning_files
import numpy as np
import pytest
import torch
from test_public_checkpoint import Call, archive, refused

from dvae.models.importers import calls
from dvae.models.importers.checkpoint_file import Checkpoint
from dvae.models.importers.unpickle import InertObject

STATE = {"w": torch.ones(2)}
BLOCKS = "8x1,8d8"


class Strategy(enum.Enum):
    """A member of an enumeration that dvae does not know."""

    DDP = "ddp"


class Level(enum.IntFlag):
    LOW = 1


Pair = collections.namedtuple("Pair", "a b")

VALUES = {
    "Counter": collections.Counter({1: 2, "a": 3}),
    "deque": collections.deque([1, 2], maxlen=3),
    "OrderedDict": collections.OrderedDict(a=1),
    "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "UserDict": collections.UserDict({"a": 1}),
    "namedtuple": Pair(1, "b"),
    "partial": functools.partial(torch.add, 1, alpha=2),
    "datetime": datetime.datetime(2022, 1, 2, 3, 4, 5),
    "datetime of a zone": datetime.datetime(2022, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=2))),
    "date": datetime.date(2022, 1, 2),
    "time": datetime.time(3, 4),
    "timedelta": datetime.timedelta(days=1, seconds=2),
    "Decimal": decimal.Decimal("1.50"),
    "Fraction": fractions.Fraction(1, 3),
    "UUID": uuid.UUID(int=5),
    "enum member": Strategy.DDP,
    "flag": Level.LOW,
    "numpy float": np.float64(1.5),
    "numpy int": np.int32(4),
    "numpy bool": np.bool_(True),
    "numpy array": np.arange(6).reshape(2, 3),
    "numpy array of text": np.array(["a", "bc"]),
    "numpy dtype": np.dtype("float32"),
    "numpy generator": np.random.default_rng(0),
    "numpy random state": np.random.RandomState(0),
    "path": pathlib.PurePosixPath("a/b"),
    "windows path": pathlib.PureWindowsPath("a\\b"),
    "Namespace": argparse.Namespace(a=1, b=[2]),
    "SimpleNamespace": types.SimpleNamespace(a=1),
    "complex": 1 + 2j,
    "range": range(3),
    "slice": slice(1, 2),
    "bytes": b"\x00\xff",
    "bytearray": bytearray(b"ab"),
    "set": {1, 2},
    "frozenset": frozenset({1}),
    "pattern": re.compile("a+"),
    "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
    "Size": torch.Size([1, 2]),
    "class": torch.nn.GELU,
    "module": torch.nn.GELU(),
    "function": torch.nn.functional.gelu,
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", VALUES)
def test_values_beside_the_weights_are_data(tmp_path, name, protocol):
    hyper_parameters = {"value": VALUES[name], "enc_block_str": BLOCKS}
    contents = {"callbacks": [VALUES[name]], "state_dict": STATE, "hyper_parameters": hyper_parameters}
    torch.save(contents, tmp_path / "model.ckpt", pickle_protocol=protocol)
    with Checkpoint(tmp_path / "model.ckpt") as checkpoint:
        assert checkpoint.settings()["enc_block_str"] == BLOCKS
        assert torch.equal(checkpoint.state()["w"].load(), torch.ones(2))


def test_a_scheduler_of_lightning_with_milestones(tmp_path):
    """MultiStepLR keeps its milestones in a Counter."""
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [10, 20])
    torch.save({"state_dict": STATE, "lr_schedulers": [schedule.state_dict()]}, tmp_path / "model.ckpt")
    with Checkpoint(tmp_path / "model.ckpt") as checkpoint:
        milestones = checkpoint.contents["lr_schedulers"][0]["milestones"]
    assert isinstance(milestones, InertObject)
    assert milestones.kind == "collections.Counter"


def test_a_member_of_an_enumeration_as_some_pythons_store_it(tmp_path):
    path = lightning_files.save(tmp_path / "model.ckpt", STATE, {"value": Call(getattr, Strategy, "DDP")})
    assert Checkpoint(path).settings()["value"].kind == "__builtin__.getattr"


CODE = {
    "os.system": Call(os.system, "true"),
    "os.getpid": Call(os.getpid),
    "subprocess.run": Call(subprocess.run, ["true"]),
    "subprocess.Popen": Call(subprocess.Popen, "true"),
    "eval": Call(eval, "1"),
    "exec": Call(exec, "1"),
    "compile": Call(compile, "1", "a", "eval"),
    "open": Call(open, "a"),
    "__import__": Call(builtins.__import__, "os"),
    "print": Call(print, "a"),
    "import_module": Call(importlib.import_module, "os"),
    "getattr of a function": Call(getattr, os.system, "__call__"),
    "getattr of a class, hidden": Call(getattr, Strategy, "__init__"),
    "getattr of a class with code": Call(getattr, subprocess.Popen, "wait"),
    "attrgetter": Call(operator.attrgetter, "system"),
    "rmtree": Call(shutil.rmtree, "a"),
    "a timer": Call(threading.Timer, 1),
    "exit": Call(sys.exit, 1),
    "loads": Call(pickle.loads, b"N."),
    "torch.load": Call(torch.load, "a"),
    "torch.jit.load": Call(torch.jit.load, "a"),
    "torch.hub.load": Call(torch.hub.load, "a", "b"),
    "a file": Call(np.load, "a"),
    "reduce": Call(functools.reduce, max, [1]),
}


@pytest.mark.parametrize("name", CODE)
def test_calls_that_could_run_code_are_refused(tmp_path, name):
    message = refused(lightning_files.save(tmp_path / "evil.ckpt", STATE, {"value": CODE[name]}))
    assert "refused, and nothing in it was run" in message
    assert "do not load this file with torch either" in message


def test_a_result_of_getattr_cannot_be_called(tmp_path):
    """A record stands for it, and a record is no name."""
    module, name = Strategy.__module__, Strategy.__qualname__
    member = f"cbuiltins\ngetattr\n(c{module}\n{name}\nX\x03\x00\x00\x00DDPtR"
    path = archive(tmp_path / "evil.ckpt", b"\x80\x02" + member.encode() + b")R.")
    assert "it calls a value that is not a class or function" in refused(path)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [("mine.helpers.make_model", (1,)), ("mine.Model", (1, 2)), ("mine.Model", ([],)), ("torch.tensor", ([1],))],
)
def test_an_unknown_call_is_named_without_blame(tmp_path, function, arguments):
    module, _, name = function.rpartition(".")
    made = b"\x80\x02c" + f"{module}\n{name}\n".encode() + pickle.dumps(arguments, 2)[2:-1] + b"R."
    message = refused(archive(tmp_path / "own.ckpt", made))
    assert f"makes an object with '{function}', which dvae does not know" in message
    assert "dvae did not run it" in message
    assert "save its state_dict alone" in message
    assert "refused" not in message
    assert "do not load" not in message


def test_advice_for_an_unknown_call_works(tmp_path):
    """A file with the state dict alone is read."""
    torch.save({"state_dict": STATE}, tmp_path / "alone.ckpt")
    with Checkpoint(tmp_path / "alone.ckpt") as checkpoint:
        assert list(checkpoint.state()) == ["w"]


def test_no_call_is_both_data_and_code():
    assert [path for path in calls.DATA_CALLS if path.startswith(calls.CODE_PREFIXES)] == []
    known = [path for path in calls.DATA_CALLS if path.partition(".")[0] in calls.CODE_MODULES]
    assert known == ["types.SimpleNamespace"]
    assert calls.DATA_PACKAGES.isdisjoint(calls.CODE_MODULES)


def test_a_file_is_read_without_running_what_it_holds(tmp_path):
    """Objects whose classes would run code on loading, and a function in a partial, stay records."""
    mark = tmp_path / "ran"
    value = functools.partial(os.system, f"touch {mark}")
    path = lightning_files.save(tmp_path / "model.ckpt", STATE, {"value": value})
    assert Checkpoint(path).settings()["value"].kind == "functools.partial"
    assert not Path(mark).exists()
