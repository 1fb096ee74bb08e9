"""Errors that are shown to the user in one line: what is wrong, the value, and what to do."""

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
"""Error numbers of a disk that is full, over its quota, read-only or broken."""


class UserError(Exception):
    """A mistake that the user can fix. Ends the command with one line and exit status 2."""

    exit_status = 2


class MachineError(Exception):
    """A fault of the machine or of a file. Ends the command with one line and exit status 1."""

    exit_status = 1
    retryable = True
    """Whether a retry without changes may succeed."""


class Stopped(MachineError):
    """The run was asked to stop, and can be resumed. Exit status 143, as after SIGTERM."""

    exit_status = 143

    def __init__(self, message: str, stop_reason: str = "") -> None:
        super().__init__(message)
        self.stop_reason = stop_reason
        """What asked for the stop: the name of a signal, or the setting of a limit."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the closest known name, then all known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names) or 'none'}"


def fold(text: object) -> str:
    """Return `text` in one line: each run of white space becomes one space."""
    return " ".join(str(text).split())


def printable_line(text: object) -> str:
    """Return `text` as one line for a terminal, without secrets. Unprintable characters are replaced by escapes."""
    line = fold(scrub(str(text)))  # scrub first: folding could alter a secret that contains white space
    # Scrub again, because folding and escaping may turn the text into a known spelling of a secret.
    return scrub("".join(one if one.isprintable() else f"\\x{ord(one):02x}" for one in line))


def run_command(command: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Run `command(argv)`, and turn its errors into one line on stderr and an exit status.

    An unexpected error is printed with its traceback. Secrets are removed from the traceback too.
    """
    guard_streams()
    try:
        command(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:  # the program that reads stdout (head, less) has ended: do not write to it again on exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, MachineError, OSError, ModuleNotFoundError, KeyboardInterrupt) as error:
        words = describe(error)
        if words is None:
            fail_with_traceback()
        line, status = words
        print(f"dvae: {'' if isinstance(error, KeyboardInterrupt) else 'error: '}{line}", file=sys.stderr)
        sys.exit(status)
    except Exception:  # noqa: BLE001 printed here, because Python would print the traceback with its secrets
        fail_with_traceback()


def fail_with_traceback() -> NoReturn:
    """Print the traceback of the current exception to stderr, and exit with status 1."""
    print(traceback.format_exc(), end="", file=sys.stderr)
    sys.exit(1)


def describe(error: BaseException) -> tuple[str, int] | None:
    """Return an error in one line and its exit status. None if the user cannot fix it."""
    if isinstance(error, UserError | MachineError):
        return printable_line(error), error.exit_status
    if isinstance(
        error, KeyboardInterrupt
    ):  # training has saved by now (training/resilience/stopping.py); the other stages start again from the beginning
        return "interrupted: the same command again resumes", 130
    if isinstance(error, ModuleNotFoundError) and error.name and not f"{error.name}.".startswith("dvae."):
        package = error.name.partition(".")[0]
        advice = "`pip install dvae` brings what all commands need; requirements-inference.txt what bundles need"
        return printable_line(f"the package {package} is not installed: {advice}"), UserError.exit_status
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        where = f" ({error.filename})" if error.filename else ""
        mend = "finished stages and checkpoints are complete; fix the disk, then run the same command again"
        return printable_line(f"{error.strerror}{where}: {mend}"), MachineError.exit_status
    if isinstance(error, OSError) and error.filename:
        return printable_line(f"{error.filename}: {error.strerror or error}"), MachineError.exit_status
    return None


def summarize(error: BaseException) -> tuple[str, int]:
    """Return any error in one line, and its exit status. Print the traceback of an unexpected error."""
    known = describe(error)
    if known is None:
        traceback.print_exception(error)
    return known or (f"{type(error).__name__}: {fold(error)}", MachineError.exit_status)


def reason_of(error: BaseException) -> str:
    """Return the type and the message of an error in one line of at most 400 characters.

    An error of a plug-in may raise another error when it is turned into text. The line then says so.
    """
    try:
        name, text = type(error).__name__, str(error)
        return printable_line(f"{name}: {text}" if text else name)[:400]
    except BaseException:  # noqa: BLE001 the message comes from code of others, which may fail in any way
        return "it failed with an error whose message cannot be read"
