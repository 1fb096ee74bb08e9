"""Runs on a real SLURM of two nodes on this machine: the same weights whatever happens to the job on its way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from slurm_cluster import Cluster
from tests_support import ROOT

from dvae.runs import attempts
from dvae.runs.slurm import queue

pytestmark = [pytest.mark.slow, pytest.mark.alone]
STEPS = 60
SLURM = ["launcher=slurm", "launcher.nodes=2", "launcher.cpus_per_task=1", "launcher.retry_seconds=0.5"]


@pytest.fixture(scope="module")
def words(tiny: list[str]) -> list[str]:
    """A run long enough for something to happen to it, in arithmetic that depends on the number of ranks alone."""
    found = list(tiny)
    for stage in ("train_encoder", "train_refiner"):
        found += [f"{stage}.precision=fp32", f"{stage}.steps={STEPS}", f"{stage}.preview_every=50"]
        found += [f"{stage}.save_every=20"]
    return found


SLOW = """
import os
import time

from dvae.training.resilience import watchdog

before = watchdog.heartbeat


def heartbeat(stage, step, phase):
    if phase == "data":
        time.sleep(float(os.environ["SECONDS_BEFORE_A_STEP"]))
    before(stage, step, phase)


watchdog.heartbeat = heartbeat
"""
"""A plug-in that makes a step take long, and the machine no hotter."""


class Runs:
    """Starts tools on the cluster, in a folder of their own."""

    def __init__(self, cluster: Cluster, words: list[str], folder: Path) -> None:
        self.cluster, self.words, self.folder = cluster, words, folder

    def tool(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *words]
        path = os.pathsep.join([str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = self.cluster.clean_environment(PYTHONPATH=path)
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=600, check=False
        )

    def launch(self, run: Path, *words: str) -> str:
        """Submit a run; returns the number of its last job."""
        done = self.tool("launch", *self.words, *SLURM, f"run={run}", *words)
        assert done.returncode == 0, done.stderr
        return queue.submitted_jobs(run)[-1].id

    def slow(self, seconds: float) -> list[str]:
        """Words for a run whose steps take that long at least."""
        (self.folder / "slow_steps.py").write_text(SLOW)
        return [f'launcher.setup=["export SECONDS_BEFORE_A_STEP={seconds}"]', "plugins=[slow_steps]"]

    def follow(self, run: Path) -> subprocess.CompletedProcess[str]:
        return self.tool("runs", "follow", f"run={run}")

    def finish(self, run: Path) -> Path:
        """Wait until the run has ended, well."""
        done = self.follow(run)
        assert done.returncode == 0, done.stdout + done.stderr + logs(run)
        assert done.stdout.splitlines()[-1] == f"{run} is finished", done.stdout + logs(run)
        return run

    def wait_idle(self) -> None:
        self.cluster.wait_idle()


@pytest.fixture(scope="module")
def runs(slurm: Cluster, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(slurm, words, tmp_path_factory.mktemp("slurm"))


@pytest.fixture(autouse=True)
def nothing_left(slurm: Cluster) -> Iterator[None]:
    yield
    slurm.run("scancel", "--user", str(os.getuid()))
    for node in slurm.nodes:
        if "DOWN" in slurm.run("sinfo", "-h", "-n", node, "-o", "%T").upper():
            slurm.resume(node)
    slurm.wait_idle()


@pytest.fixture(scope="module")
def two(runs: Runs) -> Path:
    """The run by two processes of this machine."""
    run = runs.folder / "processes"
    done = runs.tool("launch", *runs.words, "launcher=processes", "launcher.ranks=2", f"run={run}")
    assert done.returncode == 0, done.stderr
    return run


def logs(run: Path) -> str:
    return "".join(f"--- {path}\n{path.read_text()}" for path in sorted((run / queue.FOLDER).rglob("*.[lo][ou][gt]")))


def same(one: Path, other: Path) -> bool:
    """Weights bit for bit, and the figures of every step, each once."""
    ours, theirs = (load_file(run / "bundle" / "model.safetensors") for run in (one, other))
    equal = ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    return equal and figures(one) == figures(other)


def figures(run: Path) -> list[tuple[str, int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(row["stage"], row["step"], row["loss"]) for row in rows if "loss" in row]
    steps = range(1, STEPS + 1)
    assert [step[:2] for step in found] == [(stage, step) for stage in ("encoder", "refiner") for step in steps]
    return found


def wait_for(what: Callable[[], bool], run: Path, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, logs(run)
        time.sleep(0.02)


def under_way(run: Path, rows: int = STEPS // 3) -> None:
    """Wait until the run is in the middle of its first training."""
    path = run / "metrics.jsonl"
    wait_for(lambda: path.exists() and path.read_bytes().count(b"\n") >= rows, run)


def pids(rank: int) -> list[int]:
    """Processes of that rank."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                ours = b"dvae.runs.slurm.rank" in (entry / "cmdline").read_bytes()
                if ours and f"SLURM_PROCID={rank}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:  # it has just ended
                continue
    return sorted(found)


def ends(run: Path) -> list[int | None]:
    return [attempt.status for attempt in attempts.read(run)]


def test_two_nodes_end_as_two_processes(runs: Runs, two: Path) -> None:
    run = runs.folder / "plain"
    job = runs.launch(run, "launcher.wait=true")
    assert runs.cluster.job_state(job) in ("COMPLETING", "COMPLETED")
    assert same(run, two)
    (attempt,) = attempts.read(run)
    assert (attempt.launcher, attempt.count, attempt.job, attempt.status) == ("slurm", 2, job, 0)
    folder = run / queue.FOLDER / job
    assert "encoder: " in (folder / "rank-0.log").read_text()
    assert (folder / "rank-1.log").exists()


def test_a_killed_rank_begins_anew_in_the_same_job(runs: Runs, two: Path) -> None:
    run = runs.folder / "killed"
    job = runs.launch(run, "launcher.wait=false")
    under_way(run)
    os.kill(pids(1)[0], signal.SIGKILL)
    assert same(runs.finish(run), two)
    first, second = attempts.read(run)
    assert first.job == second.job == job
    assert first.message.startswith("rank 1 ended by SIGKILL after encoder step ")
    assert (first.status, second.status) == (1, 0)


def test_a_requeue_from_outside(runs: Runs, two: Path) -> None:
    run = runs.folder / "requeued"
    job = runs.launch(run, "launcher.wait=false")
    under_way(run)
    runs.cluster.run("scontrol", "requeue", job)
    runs.cluster.start_now(job)
    assert same(runs.finish(run), two)
    assert ends(run)[-1] == 0
    assert {attempt.job for attempt in attempts.read(run)} == {job}


def test_a_lost_node(runs: Runs, two: Path) -> None:
    run = runs.folder / "lost"
    job = runs.launch(run, "launcher.wait=false")
    under_way(run)
    runs.cluster.set_down(runs.cluster.nodes[1])
    runs.cluster.wait_state(job, "PENDING")
    runs.cluster.resume(runs.cluster.nodes[1])
    runs.cluster.start_now(job)
    assert same(runs.finish(run), two)
    assert len(ends(run)) == 2


STUCK_ONCE = """#!/bin/sh
[ -e stuck-$SLURM_PROCID ] || {{ touch stuck-$SLURM_PROCID; sleep 600; }}
exec {python} "$@"
"""


def test_ranks_that_do_not_begin_come_back_in_another_allocation(runs: Runs, two: Path) -> None:
    run, python = runs.folder / "stuck-run", runs.folder / "stuck-once"
    python.write_text(STUCK_ONCE.format(python=sys.executable))
    python.chmod(0o755)
    job = runs.launch(run, "launcher.wait=false", f"launcher.python={python}", "launcher.start_seconds=20")
    wait_for(lambda: len(ends(run)) == 1 and ends(run)[0] is not None, run)
    assert "no rank has begun within launcher.start_seconds=20" in attempts.read(run)[0].message
    runs.cluster.start_now(job)
    assert same(runs.finish(run), two)
    assert len(ends(run)) == 2


def test_another_job_needs_the_place(runs: Runs, two: Path) -> None:
    run = runs.folder / "preempted"
    job = runs.launch(run, "launcher.wait=false")
    under_way(run)
    urgent = ["--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 1"]
    runs.cluster.run("sbatch", *urgent)
    runs.cluster.wait_state(job, "PENDING")
    wait_for(lambda: len(ends(run)) == 1 and ends(run)[0] is not None, run)
    assert "saved" in attempts.read(run)[0].message
    runs.cluster.start_now(job)
    assert same(runs.finish(run), two)


def test_a_canceled_step_begins_anew_and_a_canceled_job_has_saved(runs: Runs, two: Path) -> None:
    run = runs.folder / "canceled"
    job = runs.launch(run, "launcher.wait=false", *runs.slow(0.1))
    under_way(run)
    runs.cluster.run("scancel", f"{job}.0")  # SLURM kills the ranks at once
    under_way(run, STEPS + 2)
    runs.cluster.run("scancel", job)
    done = runs.follow(run)
    assert "is stopped: stopped at refiner step" in done.stdout.splitlines()[-1], done.stdout + logs(run)
    runs.launch(run, "launcher.wait=false")
    assert same(runs.finish(run), two)
    assert ends(run) == [1, 143, 0]


def test_cancel_saves_and_frees_the_nodes(runs: Runs, two: Path) -> None:
    run = runs.folder / "asked"
    job = runs.launch(run, "launcher.wait=false", *runs.slow(0.25))
    under_way(run, 5)
    listed = runs.tool("runs", "list", f"in={run}").stdout
    assert f"job {job} is running, since" in listed
    assert "running" in listed
    again = runs.tool("launch", *runs.words, *SLURM, f"run={run}", *runs.slow(0.25))
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    done = runs.tool("runs", "cancel", f"run={run}")
    assert "stopped at encoder step" in done.stdout.splitlines()[-1], done.stdout + done.stderr + logs(run)
    assert not queue_of(runs)
    # launcher.setup is a command, so trust=true; launcher.wait is null: no terminal, no waiting
    assert runs.tool("runs", "resume", f"run={run}", "trust=true").returncode == 0
    assert same(runs.finish(run), two)


def queue_of(runs: Runs) -> str:
    return runs.cluster.run("squeue", "-h", "-t", "PENDING,RUNNING")


def test_a_deterministic_error_is_not_tried_again(runs: Runs) -> None:
    run = runs.folder / "nan"
    done = runs.tool("launch", *runs.words, *SLURM, f"run={run}", "launcher.wait=true", "train_encoder.lr=1e30")
    assert done.returncode == 1, done.stderr + logs(run)
    assert "a gradient is not finite" in done.stderr.splitlines()[-1]
    assert ends(run) == [1]


def test_the_time_limit_hits_in_mid_training_as_often_as_it_likes(runs: Runs, two: Path) -> None:
    run = runs.folder / "late"
    limit = ["launcher.time=2", "launcher.signal_seconds=45"]  # told 15 to 75 s after the job's start
    job = runs.launch(run, "launcher.wait=false", *limit, *runs.slow(0.5))
    assert same(runs.finish(run), two)
    tried = attempts.read(run)
    assert {attempt.job for attempt in tried} == {job}
    assert sum("(SIGUSR2), saved" in attempt.message for attempt in tried) >= 1
    assert tried[-1].status == 0


def test_a_sweep_whose_trials_are_jobs(runs: Runs) -> None:
    sweep = {
        "program": "tools/launch.py",
        "method": "grid",
        "metric": {"name": "encoder/loss", "goal": "minimize"},
        "parameters": {"train_encoder.lr": {"values": [1e-4, 1e-3]}},
        "command": ["${env}", "${interpreter}", "${program}", "run=x", "${args_no_hyphens}"],
    }
    (runs.folder / "mine.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    words = ["sweep=mine.yaml", "n=2", "parallel=2", "out=sweep", "stages=[shards,encoder]"]
    done = runs.tool("sweep", *words, *runs.words, *SLURM, "launcher.nodes=1")
    assert done.returncode == 0, done.stderr
    assert "2 of 2 trials finished" in done.stdout
    trials = [runs.folder / "sweep" / f"trial-{number:04d}" for number in (1, 2)]
    assert len({queue.submitted_jobs(trial)[0].id for trial in trials}) == 2


def test_a_chain_of_jobs(runs: Runs, two: Path) -> None:
    run = runs.folder / "chain"
    chain = ["launcher.chain=true", "launcher.cpu_partition=cpu", "launcher.array_jobs=2", "launcher.wait=false"]
    runs.launch(run, *chain, "stages=[shards,encoder,prior,cache,refiner,evaluate]")
    jobs = queue.submitted_jobs(run)
    first, last = ["shards"], ["evaluate"]
    assert [job.stages for job in jobs] == [first, first, ["encoder", "prior"], ["cache"], ["cache"], ["refiner"], last]
    runs.finish(run)
    ours, theirs = figures(run), figures(two)
    assert ours[:STEPS] == theirs[:STEPS]
    assert [row[2] for row in ours] == pytest.approx([row[2] for row in theirs], rel=1e-3)  # the cache rounds
    assert [attempt.count for attempt in attempts.read(run)] == [1, 2, 1, 2, 1]
    partitions = runs.cluster.run("squeue", "-h", "-t", "all", "-o", "%F %P").split("\n")
    assert f"{jobs[0].id} cpu" in partitions
    assert f"{jobs[2].id} main" in partitions
    assert f"{jobs[3].id} cpu" in partitions


def test_what_cannot_work_is_refused_before_anything_is_queued(runs: Runs) -> None:
    for words, said in (
        (["train_encoder.batch=7"], "batch 7 does not divide into 2 ranks"),
        (["launcher.partition=nowhere"], "sbatch refused the job: invalid partition specified: nowhere"),
        (["launcher.chain=true", 'launcher.sbatch=["--nodelist=nowhere"]'], "sbatch refused the job"),
    ):
        run = runs.folder / "refused"
        done = runs.tool("launch", *runs.words, *SLURM, f"run={run}", *words)
        assert (done.returncode, done.stderr.count("\n"), said in done.stderr) == (2, 1, True), done.stderr
        assert not queue_of(runs)
        assert not (run / queue.FOLDER / queue.FILE).exists()
        assert not list(run.rglob("*.pkl"))
