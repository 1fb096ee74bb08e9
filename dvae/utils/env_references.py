"""References to the environment in settings, ${oc.env:NAME}: resolved as OmegaConf does, and remembered as secrets.

Importing this module replaces OmegaConf's own resolver.
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
"""What ${oc.env:...} of a variable that may be secret gives inside `marked_variables`."""
_marking = ContextVar("marking", default=False)


def _env(name: str, default: object = ...) -> object:
    """The resolver ${oc.env:NAME}, as OmegaConf has it; the values of variables that may be secret are remembered."""
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
    """While the block runs, ${oc.env:...} of a variable that may be secret gives MARK, not its value."""
    token = _marking.set(True)
    try:
        yield
    finally:
        _marking.reset(token)
