"""Helpers that several test modules import."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
Tool = Callable[..., "subprocess.CompletedProcess[str]"]
"""What the fixture `tool` gives: tool(name, *words, **environment)."""


def environment(**more: str) -> dict[str, str]:
    """The environment of a tool: one thread, and nothing of a surrounding W&B or process group."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "RANK", "WORLD_SIZE", "MASTER_"))}
    return kept | {"OMP_NUM_THREADS": "1"} | more
