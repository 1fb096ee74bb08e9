"""Keep secrets out of everything that dvae writes or prints.

A secret reaches dvae in two ways: as the value of an environment variable, or inside a URL. `scrub` removes both from a
text. It is applied to all text files (dvae/utils/atomic_files.py) and to all that a process prints (`guard_streams`).

Settings are stored with references such as ${oc.env:TOKEN} instead of the values. A resumed run therefore reads the
values from the environment again.
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
"""The text that replaces a secret."""
SHORTEST = 6
"""Minimum length of a secret value, in characters. A shorter value may be a common word, so it is not removed."""
SHORTEST_REFERRED = 4
"""The same minimum, for a variable to which a setting refers."""
SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|APIKEY|SSHPASS|(?:^|_)(?:KEY|PASS|AUTH)(?:_|$)", re.I
)
"""Environment variables whose values are secret, whether or not a setting refers to them."""
NOT_SECRET = re.compile(
    r"HOME|USER|LOGNAME|HOSTNAME|PWD|TMPDIR|SCRATCH|WORK|PROJECT|DATA(?:_?DIR)?|RANK|LOCAL_RANK|WORLD_SIZE|SLURM_\w+|"
    r"WANDB_(?:RUN_ID|SWEEP_ID|PROJECT|ENTITY|NAME|DIR|MODE)"
)
"""Environment variables that hold paths, names and numbers. Their values are not secret, so they are not removed."""
USER_INFO = re.compile(r"(?<=://)[^\s/@'\"]+(?=@)")
"""The part user:password before the host of a URL."""
PARAMETER = re.compile(
    r"(?P<name>[?&;](?:x-\w+-)?\w*(?:token|key|sig|signature|password|passwd|secret|auth|credential|security-token)\w*=)"
    r"[^&\s'\"#;]+",
    re.I,
)
"""A query parameter of a URL whose name says that its value is secret."""
HEADER = re.compile(
    r"(?P<name>(?<![\w-])(?:(?:authorization|(?:x-)?api[_-]?key|[\w-]+-token|password)\s*[:=]\s*(?:(?:basic|bearer|token)\s+)?|"
    r"bearer\s+(?=\S{6})|(?:-u|--user)\s+[^\s:]+:))[^\s'\"]+",
    re.I,
)
"""An HTTP header or a command-line option that holds a secret."""
_known: set[str] = set()


def is_secret_variable(name: str) -> bool:
    """Return whether the variable `name` is treated as a secret if a setting refers to it."""
    return NOT_SECRET.fullmatch(name) is None


def remember(value: str) -> None:
    """Register `value` as a secret, so that `scrub` removes it from now on. Values below 4 characters are ignored."""
    if len(value) >= SHORTEST_REFERRED:
        _known.add(value)


def scrub(text: str) -> str:
    """Remove the values of secret environment variables and the secret parts of URLs from `text`."""
    secret = {form for value in _known | set(_secret_variables().values()) for form in _forms(value)}
    for value in sorted(secret, key=len, reverse=True):  # longest first: a secret may contain another one
        text = text.replace(value, REMOVED)
    return _scrub_addresses(text)


def _forms(value: str) -> set[str]:
    """The spellings of `value` that a text may contain.

    These are the value itself, escaped for Python, JSON, HTML or a URL, and with line breaks folded.
    """
    quoted = {value, repr(value)[1:-1], json.dumps(value)[1:-1], html.escape(value), " ".join(value.split())}
    return {*quoted, urllib.parse.quote(value), urllib.parse.quote(value, safe="")}


class _Guarded:
    """A text stream that removes secrets from everything written to it."""

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
    """Remove secrets from all that this process prints to stdout and stderr from now on."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Guarded):
            setattr(sys, name, _Guarded(stream))


def literal_secret(text: str) -> str:
    """Find a secret in `text`. A setting that contains one is rejected before it is stored.

    Returns:
        The name of the environment variable whose value `text` contains, "PASSWORD" for a secret in a URL or a header,
        or "" if there is none.
    """
    for name, value in _secret_variables().items():
        if value in text:
            return name
    return "PASSWORD" if _scrub_addresses(text) != text else ""


def _secret_variables() -> dict[str, str]:
    """Return the environment variables whose names match `SECRET_NAME`, by name.

    A value that is an existing path is left out: the file may hold a secret, but its path is none.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and len(value) >= SHORTEST and not _is_path(value)
    }


def _is_path(value: str) -> bool:
    """Return whether `value` is the path of something that exists, for example of a key file."""
    return value.startswith(("/", "~", ".")) and os.path.exists(os.path.expanduser(value))


def _scrub_addresses(text: str) -> str:
    if "://" in text:
        text = PARAMETER.sub(lambda found: found["name"] + REMOVED, USER_INFO.sub(REMOVED, text))
    return HEADER.sub(lambda found: found["name"] + REMOVED, text)
