"""Helpers that several test modules import."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig

ROOT = Path(__file__).parent.parent
Tool = Callable[..., "subprocess.CompletedProcess[str]"]
"""What the fixture `tool` gives: tool(name, *words, **environment)."""

SURROUNDING = (
    "WANDB_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "SLURM", "SBATCH_", "SRUN_",
    "SUBMITIT_",
)  # fmt: skip
"""How variables begin that a tool would take for word of where it runs."""


def environment(**more: str) -> dict[str, str]:
    """The environment of a tool: one thread, and nothing of a surrounding W&B, process group or SLURM."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SURROUNDING)}
    return kept | {"OMP_NUM_THREADS": "1"} | more


def dry_run(composed: DictConfig) -> str:
    """What dry_run=true prints of a composed config."""
    from dvae.runs.dry_run import describe  # here, because every test imports this file
    from dvae.runs.launch_checks import check_launch

    return describe(check_launch(composed))


def reseal(folder: Path) -> None:
    """Make a bundle's hashes right again after its files were changed, as a hostile author would."""
    path = folder / "bundle.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    for name in about["sha256"]:
        if (folder / name).is_file():
            about["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    about.pop("self_sha256", None)
    about["self_sha256"] = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(about), encoding="utf-8")
