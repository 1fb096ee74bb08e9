"""Keep secrets out of everything that dvae writes or prints.

A secret reaches dvae in two ways: as the value of an environment variable, or inside an address. `scrub` removes both
from a text. All text files (dvae/utils/atomic_files.py) and all that a process prints (`guard_streams`) pass it.
Settings are written down with references such as ${oc.env:TOKEN} in place of the values, so a resumed run reads the
value from the environment again.
"""

from __future__ import annotations

import html
import json
import os
import re
import sys
import urllib.parse
from collections.abc import Iterable
from typing import Any, TextIO

REMOVED = "***"
"""What stands in the place of a secret."""
SHORTEST = 6
"""Characters of a variable's value; a shorter one cannot be told from a common word."""
SHORTEST_REFERRED = 4
"""The same, of a variable to which a setting refers."""
SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|APIKEY|SSHPASS|(?:^|_)(?:KEY|PASS|AUTH)(?:_|$)", re.I
)
"""Environment variables whose values are secret, whether or not a setting refers to them."""
NOT_SECRET = re.compile(
    r"HOME|USER|LOGNAME|HOSTNAME|PWD|TMPDIR|SCRATCH|WORK|PROJECT|DATA(?:_?DIR)?|RANK|LOCAL_RANK|WORLD_SIZE|SLURM_\w+|"
    r"WANDB_(?:RUN_ID|SWEEP_ID|PROJECT|ENTITY|NAME|DIR|MODE)"
)
"""Environment variables that hold places and numbers; their values are written down as they are."""
USER_INFO = re.compile(r"(?<=://)[^\s/@'\"]+(?=@)")
"""user:password before the host of an address."""
PARAMETER = re.compile(
    r"(?P<name>[?&;](?:x-\w+-)?\w*(?:token|key|sig|signature|password|passwd|secret|auth|credential|security-token)\w*=)"
    r"[^&\s'\"#;]+",
    re.I,
)
"""A parameter of an address whose name tells that it is secret."""
HEADER = re.compile(
    r"(?P<name>(?<![\w-])(?:(?:authorization|(?:x-)?api[_-]?key|[\w-]+-token|password)\s*[:=]\s*(?:(?:basic|bearer|token)\s+)?|"
    r"bearer\s+(?=\S{6})|(?:-u|--user)\s+[^\s:]+:))[^\s'\"]+",
    re.I,
)
"""A header or an option of a command that holds a secret."""
_known: set[str] = set()


def is_secret_variable(name: str) -> bool:
    """Whether the value of the environment variable `name` is treated as a secret if a setting refers to it."""
    return NOT_SECRET.fullmatch(name) is None


def remember(value: str) -> None:
    """Remove `value` from every later output of this process."""
    if len(value) >= SHORTEST_REFERRED:
        _known.add(value)


def scrub(text: str) -> str:
    """`text` without the values of secret environment variables and without the secret parts of addresses."""
    secret = {form for value in _known | set(_secret_variables().values()) for form in _forms(value)}
    for value in sorted(secret, key=len, reverse=True):
        text = text.replace(value, REMOVED)
    return _scrub_addresses(text)


def _forms(value: str) -> set[str]:
    """The ways in which a text may hold a value: as it is, quoted for Python, JSON, HTML or an address, folded."""
    quoted = {value, repr(value)[1:-1], json.dumps(value)[1:-1], html.escape(value), " ".join(value.split())}
    return {*quoted, urllib.parse.quote(value), urllib.parse.quote(value, safe="")}


class _Guarded:
    """A text stream whose every write is scrubbed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(scrub(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_streams() -> None:
    """Scrub all that this process prints to stdout and stderr from now on."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Guarded):
            setattr(sys, name, _Guarded(stream))


def literal_secret(text: str) -> str:
    """The name of the variable whose value stands in `text`, or "password" for one in an address; "" if there is none.

    Used to refuse a setting before it is written down.
    """
    for name, value in _secret_variables().items():
        if value in text:
            return name
    return "PASSWORD" if _scrub_addresses(text) != text else ""


def _secret_variables() -> dict[str, str]:
    """Environment variables with a secret's name; a path to a file with a secret is none itself."""
    return {
        name: value
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and len(value) >= SHORTEST and not _is_path(value)
    }


def _is_path(value: str) -> bool:
    """Whether a value names a file that exists, such as that of a key."""
    return value.startswith(("/", "~", ".")) and os.path.exists(os.path.expanduser(value))


def _scrub_addresses(text: str) -> str:
    if "://" in text:
        text = PARAMETER.sub(lambda found: found["name"] + REMOVED, USER_INFO.sub(REMOVED, text))
    return HEADER.sub(lambda found: found["name"] + REMOVED, text)
