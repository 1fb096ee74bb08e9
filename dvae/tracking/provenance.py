"""Describe the code and the machine of a run, for W&B's table of runs.

The URL of the repository and the command line are left out, because they may contain secrets. Secrets are removed from
the diff.
"""

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
    """Return the version of dvae. In a git checkout of dvae, add the commit and whether files differ from it."""
    commit = _git("rev-parse", "HEAD")
    changed = {"commit": commit.strip(), "changed": bool(diff().strip())} if commit else {}
    return {"version": package.VERSION, **changed}


def diff() -> str:
    """Return `git diff HEAD` without secrets, or "" if dvae is not in a git checkout."""
    return scrub(_git("diff", "HEAD"))


def _git(*words: str) -> str:
    """Run git in the checkout whose root contains dvae, and return its output.

    Returns "" if there is no checkout, git is not installed, or git fails.
    """
    root = package.FOLDER.parent
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, timeout=30, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", errors="replace") if done.returncode == 0 else ""


def environment() -> dict[str, Any]:
    """Return the host, the platform, versions, the names of the GPUs, and the number of ranks."""
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
