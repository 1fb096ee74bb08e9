"""The extra `xformers`, really installed: its pair of torch, in an environment of its own that is kept between runs."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests_support import ROOT

SCRIPT = """
import json, sys
import torch
import xformers.ops
from xformers.ops import fmha
sys.path.insert(0, sys.argv[1])
from dvae.layers import attention

q = torch.randn(2, 5, 3, 8)
print(json.dumps({
    "torch": torch.__version__,
    "forward": [op.NAME for op in fmha.ALL_FW_OPS if op.is_available()],
    "backward": [op.NAME for op in fmha.ALL_BW_OPS if op.is_available()],
    "found": attention._fmha() is not None,
    "chosen": attention._choose(q, q, q, attention.AttentionBackend.auto).name,
}))
"""


def pins() -> list[str]:
    """What the extra asks for, as setup.py says."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    words = [word for node in ast.walk(tree) if isinstance(node, ast.Call) for word in node.keywords]
    return ast.literal_eval(next(word.value for word in words if word.arg == "extras_require"))["xformers"]


def environment_with(packages: list[str]) -> Path:
    """The Python of an environment with `packages`, made on first use in the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dvae-tests"
    folder = home / hashlib.sha256(" ".join([sys.version, *packages]).encode()).hexdigest()[:16]
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "numpy", *packages], check=True)
        ready.touch()
    return python


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_its_operators_register_and_are_not_taken_for_a_cpu() -> None:
    """Minutes on first use: a second torch is installed."""
    python = environment_with(pins())
    done = subprocess.run([str(python), "-c", SCRIPT, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "can't load C++/CUDA extensions" not in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["torch"].startswith("2.10.0")
    assert "cutlassF-pt" in found["forward"] or any(name.startswith("fa") for name in found["forward"]), found
    assert found["backward"]
    assert found["found"]
    assert found["chosen"] == "sdpa"
