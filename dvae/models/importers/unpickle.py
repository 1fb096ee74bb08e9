"""Read a pickle as data, without executing it.

This module interprets the instructions of a pickle one by one. No instruction can import or call anything:

- names of classes and functions become `PickledName`;
- objects of unknown classes, and calls that only make a value, become `InertObject`;
- tensors become `TensorRef`;
- all other calls raise UserError, with the name of the called function (calls.py).
"""

from __future__ import annotations

import math
import pickletools
import struct
from dataclasses import dataclass, field
from typing import Any

import torch

from dvae.errors import UserError, fold
from dvae.models.importers import calls

MOST_INSTRUCTIONS = 1_000_000
"""Most instructions of a pickle. Published checkpoints have about ten thousand."""
LARGEST = 2**40
"""Bound on the number of elements of a storage."""
LARGEST_SIDE = 2**20
"""Largest size of a tensor along one dimension."""
MOST_DIMENSIONS = 8
"""Most dimensions of a tensor."""
LARGEST_KEY = 2**60
"""Largest integer key of a mapping. Larger integers can be chosen so that all their hashes collide in a dict."""
LONGEST_KEY = 4096
"""Most characters of a key or a name. Repeated comparing or joining of long texts could take forever."""


@dataclass(frozen=True, slots=True)
class PickledName:
    """Dotted name of a class or function in a pickle, such as "os.system". It is not looked up."""

    path: str


@dataclass(eq=False, slots=True)
class InertObject:
    """Record of an object that was not created: its class and the values that the pickle gives for it."""

    kind: str
    items: dict[Any, Any] = field(default_factory=dict)
    """Entries of the object, if its class is a mapping."""
    state: Any = None
    """Attributes of the object, usually a mapping."""


@dataclass(frozen=True, slots=True)
class TensorStorage:
    """A storage: one record of the archive that holds `numel` numbers."""

    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Position of a tensor in a storage. `offset` and `stride` are in elements."""

    storage: TensorStorage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements of the tensor."""
        return math.prod(self.shape)

    @property
    def extent(self) -> int:
        """Number of elements of the storage from the first element of the tensor to its last."""
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    def within(self) -> bool:
        """Return whether the tensor is not empty, has at most as many elements as its storage, and lies inside it."""
        dimensions = len(self.shape)
        if dimensions != len(self.stride) or dimensions > MOST_DIMENSIONS:
            return False
        numbers = (self.offset, self.storage.numel, *self.shape, *self.stride)
        if (
            any(type(n) is not int or not 0 <= n < LARGEST for n in numbers)
            or max(self.shape, default=0) > LARGEST_SIDE
        ):
            return False
        return 0 < self.numel <= self.storage.numel and self.offset + self.extent <= self.storage.numel


STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
MAPPINGS = {"collections.OrderedDict", "collections.defaultdict"}
SEQUENCES = {"torch.Size", "builtins.set", "__builtin__.set", "builtins.frozenset", "__builtin__.frozenset"}
MARK = object()
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": MARK}
EMPTY: dict[str, type] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": list}
LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING",
}  # fmt: skip
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read(data: bytes, what: str) -> Any:
    """Return the content of the pickle `data` as plain values and records. `what` is its name in messages.

    Raises UserError if the pickle is incomplete or far too long, or if it calls something that a checkpoint does not
    need.
    """
    machine = _PickleMachine(what)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except (ValueError, OverflowError, struct.error) as error:  # raised by genops and this module
        raise UserError(f"{what}: not a readable checkpoint ({fold(error)[:200]}): copy it again") from None
    raise UserError(f"{what}: not a readable checkpoint (its pickle has no end): copy it again")


class _PickleMachine:
    """Interpreter of pickle instructions, with their stack and memo (documented in pickletools)."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.work = 0

    def spend(self, work: int) -> None:
        """Count instructions, and values that an instruction copies. Raises ValueError if there are far too many."""
        self.work += work
        if self.work > MOST_INSTRUCTIONS:
            raise ValueError(f"its pickle takes more than {MOST_INSTRUCTIONS} instructions")

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is MARK:
            raise ValueError("its stack is empty")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        items = []
        while self.stack and self.stack[-1] is not MARK:
            items.append(self.stack.pop())
        if not self.stack:
            raise ValueError("its stack has no mark")
        self.stack.pop()
        return items[::-1]

    def top(self) -> Any:
        self.stack.append(self.pop())
        return self.stack[-1]

    def step(self, name: str, argument: Any) -> None:
        """Interpret one instruction."""
        self.spend(1)
        push = self.stack.append
        if name in LITERALS:
            push(argument)
        elif name in CONSTANTS:
            push(CONSTANTS[name])
        elif name in EMPTY:
            push(EMPTY[name]())
        elif name in TUPLES:
            push(tuple([self.pop() for _ in range(TUPLES[name])][::-1]))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.top()
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in self.memo:
                raise ValueError("its memo lacks an entry")
            push(self.memo[argument])
        else:
            self._compose(name, argument)

    def _compose(self, name: str, argument: Any) -> None:
        """Interpret an instruction that makes names, containers, objects or tensors."""
        push = self.stack.append
        match name:
            case "PROTO" | "FRAME":
                pass
            case "POP":
                self.pop()
            case "POP_MARK":
                self.pop_to_mark()
            case "TUPLE" | "FROZENSET":
                push(tuple(self.pop_to_mark()))
            case "GLOBAL":
                push(_name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = self.pop(), self.pop()
                push(_name(module, attribute))
            case "BINPERSID":
                push(_storage(self.pop()))
            case "REDUCE" | "NEWOBJ":
                arguments, called = self.pop(), self.pop()
                push(self._made(called, arguments, call=name == "REDUCE"))
            case "BUILD":
                state = self.pop()
                _set_state(self.top(), state)
            case "APPEND":
                item = self.pop()
                _extend(self.top(), [item])
            case "APPENDS" | "ADDITEMS":
                items = self.pop_to_mark()
                _extend(self.top(), items)
            case "SETITEM":
                value, key = self.pop(), self.pop()
                _set_items(self.top(), [key, value])
            case "SETITEMS":
                items = self.pop_to_mark()
                _set_items(self.top(), items)
            case _:
                raise ValueError(f"the instruction {name} is in no checkpoint of torch")

    def _made(self, called: Any, arguments: Any, call: bool) -> Any:
        """Return the value or record for an object that the pickle makes by calling `called`.

        Raises UserError if the call could do more than make a value.
        """
        if not isinstance(called, PickledName) or not isinstance(arguments, tuple):
            raise ValueError("it calls a value that is not a class or function")
        path = called.path
        if path in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            return _tensor(arguments)
        if path == "torch._utils._rebuild_parameter" and arguments and isinstance(arguments[0], TensorRef):
            return arguments[0]
        if path in MAPPINGS:
            return self._mapping(arguments)
        if path in SEQUENCES:
            return arguments[0] if arguments else ()
        if call and not calls.is_data(path, arguments) and not _is_enum_member(path, arguments):
            raise UserError(f"{self.what}: {calls.refusal(path)}")
        return InertObject(path)

    def _mapping(self, arguments: tuple[Any, ...]) -> dict[Any, Any]:
        """Return an OrderedDict or defaultdict as a dict. The factory of a defaultdict is dropped."""
        made: dict[Any, Any] = {}
        if arguments and isinstance(arguments[0], list):
            # counted as work, because a short pickle can pass one long list to any number of mappings
            self.spend(len(arguments[0]))
            for pair in arguments[0]:
                if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                    raise ValueError("a mapping in it is not made of pairs")
                _set_items(made, list(pair))
        return made


def _name(module: object, attribute: object = "") -> PickledName:
    """Return the name of a class or function. Raises ValueError if it is not text or too long."""
    if not isinstance(module, str) or not isinstance(attribute, str) or len(module) + len(attribute) > LONGEST_KEY:
        raise ValueError("a name of a class in it is not a valid name")
    return PickledName(f"{module}.{attribute}")


def _storage(identity: Any) -> TensorStorage:
    """Return the storage of a persistent id ("storage", class, key, device, number of elements)."""
    match identity:
        case ("storage", PickledName(path), str(key), str(), int(numel)) if path.startswith("torch."):
            kind = path.rpartition(".")[2]
            if kind in STORAGES:
                return TensorStorage(STORAGES[kind], key, numel)
    raise ValueError("it refers to a storage of an unknown kind")


def _tensor(arguments: tuple[Any, ...]) -> TensorRef:
    """Return the tensor of the arguments (storage, offset, shape, stride, ...)."""
    match arguments:
        case (TensorStorage() as storage, int(offset), tuple(shape), tuple(stride), *_):
            return TensorRef(storage, offset, shape, stride)
    raise ValueError("a tensor in it is not laid out as torch does")


def _is_enum_member(path: str, arguments: tuple[Any, ...]) -> bool:
    """Return whether the call is getattr(class, name of an enum member)."""
    match arguments:
        case (PickledName(owner), member):
            return calls.is_enum_member(path, owner, member)
    return False


def _set_state(target: Any, state: Any) -> None:
    if isinstance(target, InertObject):
        target.state = state
    elif not isinstance(target, dict):  # attributes of an OrderedDict (versions of modules) are ignored
        raise ValueError("it sets attributes of a value that has none")


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, InertObject):  # the items of a list of an unknown class are not needed
        raise ValueError("it appends to a value that is not a list")


def _set_items(target: Any, flat: list[Any]) -> None:
    """Set the items of a mapping from the list [key, value, key, value, ...]."""
    entries = target.items if isinstance(target, InertObject) else target
    if not isinstance(entries, dict) or len(flat) % 2:
        raise ValueError("it sets items of a value that is not a mapping")
    for key, value in zip(flat[::2], flat[1::2], strict=True):
        _check_key(key)
        entries[key] = value


def _check_key(key: Any) -> None:
    """Raise ValueError if a key could take very long to hash or to compare."""
    # tuples are not allowed, because nested shared tuples take exponential time to hash
    if not isinstance(key, (str, bytes, int, float, PickledName, InertObject, type(None))):
        raise ValueError(f"a mapping in it has a {type(key).__name__} for a key")
    if isinstance(key, int) and abs(key) > LARGEST_KEY:
        raise ValueError("a mapping in it has a huge number for a key")
    if isinstance(key, (str, bytes)) and len(key) > LONGEST_KEY:
        raise ValueError(f"a mapping in it has a key of more than {LONGEST_KEY} characters")
