"""Classification of the calls in the pickle of a checkpoint.

A call only makes a value, or could run code, or is unknown. dvae never executes a call of a pickle. It replaces calls
that only make a value by inert records, and refuses all other calls.
"""

from __future__ import annotations

from typing import Any

from dvae.models.importers.quoting import quoted

DATA_CALLS = {
    "_codecs.encode", "argparse.Namespace", "copyreg._reconstructor", "copy_reg._reconstructor", "re._compile",
    "types.SimpleNamespace", "torch.device", "torch.torch_version.TorchVersion",
    "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.core.numeric._frombuffer",
    "numpy._core.numeric._frombuffer", "numpy.random._pickle.__randomstate_ctor",
    "numpy.random._pickle.__generator_ctor", "numpy.random.bit_generator.__pyx_unpickle_SeedSequence",
    "numpy.random._pickle.__bit_generator_ctor",
    "collections.Counter", "collections.ChainMap", "collections.deque", "collections.UserDict", "collections.UserList",
    "collections.UserString", "functools.partial", "decimal.Decimal", "fractions.Fraction", "uuid.UUID",
    "datetime.date", "datetime.datetime", "datetime.time", "datetime.timedelta", "datetime.timezone",
}  # fmt: skip
"""Functions and classes whose calls make a value and have no other effect."""
DATA_TYPES = {
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set",
    "slice", "str", "tuple", "long", "unicode", "xrange",
}  # fmt: skip
"""Builtin types whose calls only make a value. The last three are types of Python 2, found in older pickles."""
DATA_PACKAGES = {"pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "pathlib"}
"""Packages whose classes (capitalized names) occur as calls in checkpoints. These calls only make a value."""
BUILTINS = {"builtins", "__builtin__"}
CODE_MODULES = {
    "_io", "_pickle", "_posixsubprocess", "_winapi", "asyncio", "bdb", "cProfile", "cloudpickle", "code", "codeop",
    "commands", "concurrent", "ctypes", "dill", "distutils", "doctest", "ensurepip", "fileinput", "ftplib", "gc",
    "glob", "http", "idlelib", "imaplib", "imp", "importlib", "inspect", "io", "joblib", "linecache", "marshal",
    "mmap", "multiprocessing", "nt", "operator", "os", "pdb", "pickle", "pip", "pkg_resources", "pkgutil", "platform",
    "popen2", "poplib", "posix", "profile", "pty", "pydoc", "requests", "runpy", "setuptools", "shelve", "shutil",
    "signal", "site", "smtplib", "socket", "socketserver", "sqlite3", "ssl", "subprocess", "sys", "tempfile", "test",
    "telnetlib", "threading", "timeit", "trace", "types", "unittest", "urllib", "urllib2", "venv", "webbrowser",
    "xmlrpc", "zipimport",
}  # fmt: skip
"""Modules with which a pickle can run a program or code, or read and write files."""
CODE_PREFIXES = (
    "torch.load", "torch.serialization.", "torch.storage._load", "torch.hub.", "torch.jit.", "torch.package.",
    "torch.utils.cpp_extension.", "torch.utils.model_zoo.", "torch.multiprocessing.", "torch._inductor.",
    "numpy.testing.", "numpy.distutils.", "numpy.f2py.", "numpy.load", "numpy.memmap", "functools.reduce",
    "logging.config.",
)  # fmt: skip
"""Prefixes of names that can do the same, in packages that are harmless otherwise."""


def is_data(path: str, arguments: tuple[Any, ...]) -> bool:
    """Return whether calling `path` with `arguments` only makes a value, so that a record can replace the result."""
    package, _, rest = path.partition(".")
    if path in DATA_CALLS or (package in BUILTINS and rest in DATA_TYPES):
        return True
    if runs_code(path):
        return False
    return _is_class(path) and (package in DATA_PACKAGES or _is_member(arguments))


def is_enum_member(path: str, owner: str, member: object) -> bool:
    """Return whether the call is getattr(owner, member), with which some Python versions pickle an enum member."""
    plain = isinstance(member, str) and member.isidentifier() and not member.startswith("_")
    getter = path in {f"{module}.getattr" for module in BUILTINS}
    return getter and plain and _is_class(owner) and not runs_code(owner) and owner.partition(".")[0] not in BUILTINS


def runs_code(path: str) -> bool:
    """Return whether a call of `path`, if it were executed, could run code or access files."""
    package, _, rest = path.partition(".")
    return package in CODE_MODULES or path.startswith(CODE_PREFIXES) or (package in BUILTINS and rest not in DATA_TYPES)


def refusal(path: str) -> str:
    """Return the error message for a file that calls `path`, if `is_data` is false for the call."""
    if runs_code(path):
        return (
            f"its pickle calls {quoted(path)}, which no weights need: refused, and nothing in it was run; do not load "
            "this file with torch either unless you trust it"
        )
    return (
        f"its pickle makes an object with {quoted(path)}, which dvae does not know; dvae did not run it and read no "
        "further: if you trust the file, load it with torch where that code is installed, and save its state_dict "
        "alone with torch.save({'state_dict': checkpoint['state_dict']}, FILE)"
    )


def _is_class(path: str) -> bool:
    """Return whether the last part of a dotted name looks like the name of a class."""
    return path.rpartition(".")[2].lstrip("_")[:1].isupper()


def _is_member(arguments: tuple[Any, ...]) -> bool:
    """Return whether the arguments are one plain value, which is how pickles store enum members."""
    return len(arguments) == 1 and isinstance(arguments[0], (str, int, float))
