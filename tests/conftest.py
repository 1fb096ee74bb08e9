"""What all tests share: the demo recipe, shrunk until it runs in seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from slurm_cluster import Cluster, cluster, missing
from tests_support import ROOT, Tool, environment

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests start processes beside this one: idle threads would spin

# the same examples in every run: a failure is of the change, and comes again; --hypothesis-profile=default explores
settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Words for tools/launch.py: 160 faces of 16x16, a few steps of small networks, no metrics."""
    words = [
        "recipe=demo", "image_size=16", "source.n=160", "data.workers=1", "data.heldout_fraction=0.2",
        "encoder.resolutions=[8,4,1]", "encoder.channels=[16,16,32]", "encoder.encoder_blocks=[1,1,1]",
        "encoder.decoder_blocks=[1,1,1]", "encoder.latent_dim=8", "prior.components=2", "refiner.width=32",
        "refiner.multipliers=[1]", "refiner.blocks=1", "refiner.attention_resolutions=[]", "sampler.steps=2",
        "evaluate.metrics=false", "evaluate.n=8", "evaluate.seeds=[0]",
    ]  # fmt: skip
    for stage in ("train_encoder", "train_refiner"):
        words += [f"{stage}.steps=6", f"{stage}.batch=8", f"{stage}.log_every=1", f"{stage}.save_every=2"]
        words += [f"{stage}.warmup=2", f"{stage}.preview_every=3"]
    return words


@pytest.fixture
def tool(tmp_path: Path) -> Tool:
    """Run tools/<name>.py with words, in a fresh interpreter and in tmp_path."""

    def run(name: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment(**more), capture_output=True, text=True, timeout=600
        )

    return run


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A real SLURM of two nodes. Where its programs are missing the test is skipped, or fails if CI may not skip it."""
    if reason := missing():
        if os.environ.get("CI") or os.environ.get("DVAE_NEED_SLURM"):
            pytest.fail(reason)
        pytest.skip(reason)
    with cluster() as running:
        yield running
