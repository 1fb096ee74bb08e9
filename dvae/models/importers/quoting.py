"""Texts of a stranger's file in messages: quoted, short and on one line."""

from __future__ import annotations

LONGEST = 80
"""Characters of a text that a message shows."""


def quoted(value: object) -> str:
    """`value` in quotation marks, cut to 80 characters and with escapes for what cannot be printed.

    A value that is no text is named by its type alone: printing it could take forever (shared nesting, cycles), or fail
    (a number of thousands of digits).
    """
    if not isinstance(value, str):
        return f"({type(value).__name__})"
    return repr(value if len(value) <= LONGEST else value[: LONGEST - 3] + "...")
