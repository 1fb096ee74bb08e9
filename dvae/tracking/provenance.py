"""Which code a run is made by, and on what: for W&B's table of runs. No address of a repository, no command line: they
may hold secrets, and what else might is scrubbed."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from importlib.metadata import version
from typing import Any

from dvae.utils import package
from dvae.utils.secrets import scrub


def code() -> dict[str, Any]:
    """Version of dvae; where it lies in a git checkout of its own, commit, and whether files differ from it."""
    commit = _git("rev-parse", "HEAD")
    changed = {"commit": commit.strip(), "changed": bool(diff().strip())} if commit else {}
    return {"version": package.VERSION, **changed}


def diff() -> str:
    """What differs from the commit in files that git knows, without secrets; empty where there is no checkout."""
    return scrub(_git("diff", "HEAD"))


def _git(*words: str) -> str:
    """What git says of the checkout in whose root dvae lies; empty where there is none, or no git."""
    root = package.FOLDER.parent
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, timeout=30, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", errors="replace") if done.returncode == 0 else ""


def environment() -> dict[str, Any]:
    """Machine, versions, GPUs and ranks."""
    import torch

    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "deepspeed": version("deepspeed"),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
    }
