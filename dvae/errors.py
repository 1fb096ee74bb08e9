"""Errors that a person reads: one line that says what, the value, and what to do."""

from __future__ import annotations

import difflib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import NoReturn

from dvae.utils.secrets import guard_streams, scrub

DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


class UserError(Exception):
    """A mistake the user can mend. Ends the command with one line and exit status 2."""

    exit_status = 2


class MachineError(Exception):
    """A fault of the machine or of a file; names the file and what is safe. Exit status 1."""

    exit_status = 1
    retryable = True
    """Whether the same might work another time."""


class Stopped(MachineError):
    """The run was asked to stop, and saved what it had. Exit status 143: terminated, to be continued."""

    exit_status = 143

    def __init__(self, message: str, stop_reason: str = "") -> None:
        super().__init__(message)
        self.stop_reason = stop_reason
        """What asked: a signal's name, or the setting of a limit."""


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an unknown-name message: the nearest known name, and all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names) or 'none'}"


def fold(text: object) -> str:
    """`text` with line breaks folded, for messages that must stay on one line."""
    return " ".join(str(text).split())


def printable_line(text: object) -> str:
    """`text` as one line for a terminal: no secrets, no control characters, nothing that cannot be encoded."""
    line = fold(scrub(str(text)))  # before it is folded: a secret may hold spaces
    return scrub("".join(one if one.isprintable() else f"\\x{ord(one):02x}" for one in line))


def run_command(command: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Run a tool's `command(argv)`; turn its errors into one line on stderr and an exit status.

    An error that dvae does not expect is printed with its traceback, for a report; secrets are removed from it too.
    """
    guard_streams()
    try:
        command(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:  # the reader of our stdout (head, less) left: nothing to tell it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, MachineError, OSError, ModuleNotFoundError, KeyboardInterrupt) as error:
        words = describe(error)
        if words is None:
            fail_with_traceback()
        line, status = words
        print(f"dvae: {'' if isinstance(error, KeyboardInterrupt) else 'error: '}{line}", file=sys.stderr)
        sys.exit(status)
    except Exception:  # noqa: BLE001 reported whole, without the secrets that a message may hold
        fail_with_traceback()


def fail_with_traceback() -> NoReturn:
    """Print the traceback of the current exception, without secrets, and end with status 1."""
    print(traceback.format_exc(), end="", file=sys.stderr)
    sys.exit(1)


def describe(error: BaseException) -> tuple[str, int] | None:
    """An error in one line, and its exit status; None where it is none that a person can mend."""
    if isinstance(error, UserError | MachineError):
        return printable_line(error), error.exit_status
    if isinstance(
        error, KeyboardInterrupt
    ):  # training saves first (training/resilience/stopping.py); the other stages start over
        return "interrupted: the same command again resumes", 130
    if isinstance(error, ModuleNotFoundError) and error.name and not f"{error.name}.".startswith("dvae."):
        package = error.name.partition(".")[0]
        advice = "`pip install dvae` brings what all commands need; requirements-inference.txt what bundles need"
        return printable_line(f"the package {package} is not installed: {advice}"), UserError.exit_status
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        where = f" ({error.filename})" if error.filename else ""
        mend = "finished stages and checkpoints are whole; mend the disk, then run the same command again"
        return printable_line(f"{error.strerror}{where}: {mend}"), MachineError.exit_status
    if isinstance(error, OSError) and error.filename:
        return printable_line(f"{error.filename}: {error.strerror or error}"), MachineError.exit_status
    return None


def summarize(error: BaseException) -> tuple[str, int]:
    """Any error in one line, and its exit status. The traceback of one that dvae does not expect is printed."""
    known = describe(error)
    if known is None:
        traceback.print_exception(error)
    return known or (f"{type(error).__name__}: {fold(error)}", MachineError.exit_status)


def reason_of(error: BaseException) -> str:
    """Type and message of an error in one line, even if the message cannot be read."""
    try:
        name, text = type(error).__name__, str(error)
        return printable_line(f"{name}: {text}" if text else name)[:400]
    except BaseException:  # noqa: BLE001 the message is made by a stranger's code, which may fail in any way
        return "it failed with an error whose message cannot be read"
