"""Quote text of an untrusted file for messages: short and on one line."""

from __future__ import annotations

LONGEST = 80
"""Most characters of a text that a message shows."""


def quoted(value: object) -> str:
    """Return `value` in quotation marks, cut to 80 characters, with escapes for unprintable characters.

    For a value that is not text, only the name of its type is returned. Printing the value could take forever (nested
    shared objects, cycles) or fail (a number with thousands of digits).
    """
    if not isinstance(value, str):
        return f"({type(value).__name__})"
    return repr(value if len(value) <= LONGEST else value[: LONGEST - 3] + "...")
