"""The SLURM that tests of the launcher use is a real one, and nothing of it stays."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
import submitit
from slurm_cluster import Cluster, cluster
from tests_support import ROOT

WAIT = "sleep 300 & wait"
"""For a job's script: a trap is run at once, not after the sleep."""


def until(reached: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def submit(slurm: Cluster, script: str, *options: str) -> str:
    return slurm.run("sbatch", "--parsable", *options, "--wrap", script).strip()


def output(slurm: Cluster, job: str) -> list[str]:
    """Lines that a job has written so far, sorted, without what SLURM adds."""
    written = slurm.folder / f"slurm-{job}.out"
    lines = written.read_text(encoding="utf-8").splitlines() if written.exists() else []
    return sorted(line for line in lines if not line.startswith("slurmstepd"))


def processes(daemons: int) -> dict[str, psutil.Process]:
    """Name -> a process of the cluster whose slurm_daemons.py has this id: daemons, steps, jobs."""
    return {process.name(): process for process in psutil.Process(daemons).children(recursive=True)}


EVERYTHING = {"munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "slurmstepd", "sleep"}
"""Processes of a cluster on which a job sleeps."""


def test_a_job_on_two_nodes_ends_and_is_accounted_for(slurm: Cluster) -> None:
    job = submit(slurm, "srun bash -c 'echo $SLURM_PROCID:$SLURMD_NODENAME'", "-N2")
    slurm.wait_state(job, "COMPLETED")
    assert output(slurm, job) == ["0:127.0.0.1", "1:127.0.0.2"]
    until(lambda: slurm.run("sacct", "-n", "-X", "-P", "-j", job, "-o", "State,NNodes").split() == ["COMPLETED|2"])
    slurm.wait_idle()


def test_a_job_that_fails_is_not_waited_for_and_a_bad_command_says_why(slurm: Cluster) -> None:
    job = submit(slurm, "exit 3")
    with pytest.raises(TimeoutError, match=r"FAILED(?s:.*)ExitCode=3:0"):
        slurm.wait_state(job, "COMPLETED")
    with pytest.raises(RuntimeError, match="invalid partition"):
        submit(slurm, "true", "-p", "nowhere")


def test_a_function_of_submitit_returns_its_result(slurm: Cluster, tmp_path: Path) -> None:
    with patch.dict(os.environ, slurm.clean_environment(), clear=True):
        executor = submitit.AutoExecutor(tmp_path, cluster="slurm")
        executor.update_parameters(slurm_partition="cpu", timeout_min=15)
        assert executor.submit(int, "17").result() == 17


def test_a_requeued_job_comes_back_at_once(slurm: Cluster) -> None:
    job = submit(slurm, f"echo attempt${{SLURM_RESTART_COUNT:-0}}; [ $SLURM_RESTART_COUNT ] || {{ {WAIT}; }}",
                 "--open-mode=append")  # fmt: skip
    slurm.wait_state(job, "RUNNING")
    until(lambda: output(slurm, job) == ["attempt0"])
    slurm.run("scontrol", "requeue", job)
    began = time.monotonic()
    slurm.start_now(job)
    slurm.wait_state(job, "COMPLETED")
    assert time.monotonic() - began < 5, "requeued jobs wait 6 s here"
    assert output(slurm, job) == ["attempt0", "attempt1"]


def test_an_urgent_job_sends_the_signal_to_others_and_takes_their_nodes(slurm: Cluster) -> None:
    first = submit(slurm, f"trap 'echo told; exit 0' USR2; echo ready; {WAIT}", "-N2", "-n8", "--signal=B:USR2@90")
    slurm.wait_state(first, "RUNNING")
    until(lambda: output(slurm, first) == ["ready"])
    urgent = submit(slurm, "true", "-N2", "-n8", "-p", "urgent")
    slurm.wait_state(urgent, "COMPLETED")
    assert slurm.job_state(first) == "COMPLETED"
    assert output(slurm, first) == ["ready", "told"]
    slurm.wait_idle()


def test_jobs_of_a_node_that_goes_down_are_requeued_and_wait_for_one(slurm: Cluster) -> None:
    job = submit(slurm, WAIT, "-w", slurm.nodes[1])
    slurm.wait_state(job, "RUNNING")
    slurm.set_down(slurm.nodes[1])
    slurm.start_now(job)
    assert slurm.job_state(job) == "PENDING"
    slurm.resume(slurm.nodes[1])
    slurm.wait_state(job, "RUNNING")
    slurm.run("scancel", job)
    slurm.wait_state(job, "CANCELLED")
    slurm.wait_idle()


@pytest.mark.slow
def test_a_cluster_that_does_not_start_says_what_its_daemons_said(slurm: Cluster) -> None:
    with (
        pytest.raises(RuntimeError, match=r"slurmctld ended \(1\)(?s:.*)slurmctld: fatal") as refused,
        cluster(cpus=-3),
    ):
        pass
    folders = set(re.findall(r"/tmp/dvae-slurm\w+", str(refused.value)))
    assert folders
    assert not any(Path(folder).exists() for folder in folders)


@pytest.mark.slow
def test_a_second_cluster_beside_the_first_has_its_own_jobs_and_leaves_nothing(slurm: Cluster) -> None:
    with cluster(nodes=1) as other:
        job = submit(other, WAIT)
        until(lambda: set(processes(other.daemons.pid)) >= EVERYTHING)
        assert job not in slurm.run("squeue", "-h", "-t", "all", "-o", "%i").split()
        theirs = processes(other.daemons.pid)
    assert not [name for name, process in theirs.items() if process.is_running()]
    assert not other.folder.exists()
    slurm.wait_idle()


OWNER = """
import time
from slurm_cluster import cluster
with cluster() as slurm:
    slurm.run("sbatch", "--wrap", "sleep 300")
    print(slurm.folder, slurm.daemons.pid, flush=True)
    time.sleep(300)
"""


@pytest.mark.slow
def test_nothing_is_left_once_the_owner_was_killed() -> None:
    command = [sys.executable, "-c", OWNER]
    with subprocess.Popen(command, cwd=ROOT / "tests", stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            folder, daemons = owner.stdout.readline().split()
            until(lambda: set(processes(int(daemons))) >= EVERYTHING)
            theirs = processes(int(daemons))
        finally:
            owner.kill()
    until(lambda: not Path(folder).exists())
    assert not [name for name, process in theirs.items() if process.is_running()]
