"""Errors that a person reads: one line that says what, the value, and what to do."""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable

DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


class UserError(Exception):
    """A mistake the user can mend. Ends the command with one line and exit status 2."""

    exit_status = 2


class MachineError(Exception):
    """A fault of the machine or of a file; names the file and what is safe. Exit status 1."""

    exit_status = 1


def near(name: str, known: Iterable[str]) -> str:
    """The end of an unknown-name message: the nearest known name, and all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names) or 'none'}"


def one_line(text: object) -> str:
    """`text` with line breaks folded, for messages that must stay on one line."""
    return " ".join(str(text).split())


def run_command(command: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Run a tool's `command(argv)`; turn its errors into one line on stderr and an exit status."""
    try:
        command(sys.argv[1:] if argv is None else argv)
    except (UserError, MachineError) as error:
        print(f"dvae: error: {one_line(error)}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:  # training saves first (training/stopping.py); the other stages start over
        print("dvae: interrupted: the same command again resumes", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our stdout (head, less) left: nothing to tell it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"dvae: error: {error.strerror}{where}: finished stages and checkpoints are whole; mend the disk, then run "
            "the same command again",
            file=sys.stderr,
        )
        sys.exit(MachineError.exit_status)
