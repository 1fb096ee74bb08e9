"""A sweep file with W&B's own agent: `wandb agent` against a server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from agent_server import AgentServer
from tests_support import ROOT, environment

from dvae.experiments.sweeps import sweep_engine


@pytest.mark.slow
def test_wandbs_agent_starts_trials_which_report_the_metric(tiny: list[str], tmp_path: Path) -> None:
    sweep = yaml.safe_load((ROOT / "recipes" / "sweep" / "demo.yaml").read_text(encoding="utf-8"))
    swept = list(sweep["parameters"])
    sweep["method"] = "grid"
    sweep["metric"]["name"] = "evaluate/reconstructions/psnr"
    sweep["parameters"] = {"refiner.width": {"values": [32, 64]}}
    del sweep["early_terminate"]
    start = sweep["command"].index("${program}") + 1
    kept = [word for word in sweep["command"][start:] if word.startswith(("run=", "tracking.", "${"))]
    sweep["command"][start:] = [*(word for word in tiny if word.partition("=")[0] not in swept), *kept]
    assert sweep_engine.violations(sweep) == []
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    with AgentServer(sweep, count=2) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        places = {name: str(tmp_path / "home") for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR")}
        login = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "WANDB_SILENT": "true"}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the agent starts `python`
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "agent", "someone/test/sweep"],
            cwd=tmp_path, env=environment(**places, **login, PATH=path), capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        server.shutdown()
    assert done.returncode == 0, done.stdout + done.stderr
    assert [config["refiner.width"]["value"] for config in server.trials.values()] == [32, 64], (
        done.stdout + done.stderr
    )
    for run_id, width in (("trial1", 32), ("trial2", 64)):
        folder = tmp_path / "runs" / "sweep-demo" / run_id
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        assert config["refiner"]["width"] == width
        assert server.opened[run_id] == [run_id]  # W&B's run is that of the agent, in every stage
        told = server.summaries[run_id]
        assert told["evaluate/reconstructions/psnr"] == summary["evaluation"]["reconstructions"]["psnr"]
        assert told["refiner/loss"] == summary["figures"]["refiner/loss"]
        assert summary["figures"]["evaluate/reconstructions/psnr"] == told["evaluate/reconstructions/psnr"]
