"""Resolve ${oc.env:NAME} in settings as OmegaConf does, and register the values as secrets.

Importing this module replaces OmegaConf's resolver for "oc.env".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from omegaconf import OmegaConf
from omegaconf.resolvers.oc import env

from dvae.utils import secrets

MARK = "VALUE_OF_A_SECRET_VARIABLE_7f3a1c"
"""The value of ${oc.env:NAME} inside `marked_variables` if the variable may be secret."""
_marking = ContextVar("marking", default=False)


def _env(name: str, default: object = ...) -> object:
    """Resolve ${oc.env:NAME} or ${oc.env:NAME,DEFAULT}, and register the value if the variable may be secret."""
    secret = secrets.is_secret_variable(name)
    if secret and _marking.get():
        return MARK
    value = env(name) if default is ... else env(name, default)
    if secret and name in os.environ:
        secrets.remember(os.environ[name])
    return value


OmegaConf.register_new_resolver("oc.env", _env, replace=True)


@contextmanager
def marked_variables() -> Iterator[None]:
    """Make ${oc.env:NAME} resolve to `MARK` while the block runs, if the variable may be secret."""
    token = _marking.set(True)
    try:
        yield
    finally:
        _marking.reset(token)
