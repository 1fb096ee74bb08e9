"""A whole run over shards on a web server: two ranks, one damaged image, stopped, and resumed by one rank."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shard_server import Server, serving
from tests_support import ROOT, environment

from dvae.data.building.shard_build import build
from dvae.data.shards.manifest import Manifest
from dvae.data.shards.reader import PNG, Shards
from dvae.utils import atomic_files

DAMAGED = 70
STEPS, BATCH = 20, 8


def spoil(shards: Path) -> None:
    """Damage an image, and let the manifest vouch for the damaged shard: what a bad build would leave."""
    data = Shards(shards)
    name, offset, size = data.members.where(DAMAGED, PNG)
    with (shards / name).open("r+b") as file:
        file.seek(offset)
        file.write(b"\0" * size)
    manifest = data.manifest.as_dict()
    for shard in manifest["splits"]["train"]:
        shard["sha256"] = atomic_files.sha256(shards / shard["file"])
    atomic_files.write_json(shards / "manifest.json", manifest)


def command(tiny: list[str], server: Server, run: Path, *words: str) -> list[str]:
    stages = [
        f"train_{stage}.{word}" for stage in ("encoder", "refiner") for word in (f"steps={STEPS}", "save_every=4")
    ]
    data = [f"data.shards={server.url}", "data.log_samples=true", "data.max_bad_fraction=0.05", "data.cache_gib=0"]
    return [sys.executable, str(ROOT / "tools" / "launch.py"), *tiny, *stages, *data, f"run={run}", *words]


@pytest.mark.slow
def test_a_run_over_the_web_on_two_ranks_then_one(tmp_path: Path, tiny: list[str]) -> None:
    shards, run = tmp_path / "shards", tmp_path / "run"
    build({"name": "avatars", "n": 160}, 16, shards, 0.2, shard_size=54, workers=1)
    spoil(shards)
    count = Manifest.load(shards).count("train")
    with serving(shards) as server:
        env = environment(no_proxy="127.0.0.1")
        with (tmp_path / "out.txt").open("w") as out:
            two = command(tiny, server, run, "launcher=processes", "launcher.ranks=2")
            process = subprocess.Popen(two, env=env, stdout=out, stderr=out)
            while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 7:
                assert process.poll() is None, (tmp_path / "out.txt").read_text()
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=120) == 143, (tmp_path / "out.txt").read_text()
        done = subprocess.run(command(tiny, server, run), env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        fetched = {name: asked for name, asked in server.asked.items() if name != "manifest.json"}
    assert set(fetched.values()) == {1}  # by whichever rank
    assert len(fetched) == 12  # 3 shards and indices of each split
    for stage in ("encoder", "refiner"):
        rows = [json.loads(line) for line in (run / f"samples-{stage}.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        assert [key for row in rows for key in row["samples"]] == list(range(STEPS * BATCH))
        indices = [index for row in rows for index in row["indices"]]
        assert sorted(indices[:count]) == list(range(count))
        assert len(set(indices[count:])) == STEPS * BATCH - count
    damaged = json.loads((run / "damaged.json").read_text())
    assert list(damaged["train"]) == [str(DAMAGED)]
    said = (tmp_path / "out.txt").read_text() + done.stderr
    assert said.count("dvae: damaged image train-") >= 1
