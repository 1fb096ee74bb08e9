"""A real SLURM for tests, on this machine alone: with cluster() as slurm: slurm.run("sbatch", ...)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import slurm_daemons
from tests_support import environment

PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"
PACKAGES = {
    "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge", "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server-core",
}  # fmt: skip
"""Program -> Debian package that has it."""
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
"""States that a job does not leave by itself."""


def missing() -> str | None:
    """What to install before a cluster can start, in words; None where all is there."""
    programs = [name for name in PACKAGES if not shutil.which(name, path=PATH)]
    if not programs:
        return None
    packages = " ".join(PACKAGES[name] for name in programs)
    return f"needs {', '.join(programs)}: bash tests/install_system.sh, or apt-get install {packages}"


@dataclass
class Cluster:
    """A running cluster: partitions main, urgent (preempts the others' jobs) and cpu, all with the same nodes.

    A node claims 4 CPUs and two pretend GPUs. All share this machine, its hostname and its files.
    """

    folder: Path
    """slurm.conf, log/ and all else; gone once the cluster has stopped."""
    nodes: list[str]
    """127.0.0.1, 127.0.0.2, ..."""
    daemons: subprocess.Popen[str]
    """slurm_daemons.py, which runs until its standard input is closed."""

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment so that sbatch and the others find the cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH, "GLOO_SOCKET_IFNAME": "lo"}

    def clean_environment(self, **more: str) -> dict[str, str]:
        """All of a process's environment: ours, without traces of another cluster, job or process group."""
        return environment(**self.environment) | more

    def run(self, *words: str) -> str:
        """What a command of SLURM prints, run in `folder`; RuntimeError with its complaint where it fails."""
        done = subprocess.run(
            words, cwd=self.folder, env=self.clean_environment(), stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=120, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout

    def job_state(self, job_id: str | int) -> str:
        """State of a job or array task as squeue names it: PENDING, RUNNING, COMPLETED, ... (sacct lags behind)."""
        (state,) = set(self.run("squeue", "-h", "-t", "all", "-j", str(job_id), "-o", "%T").split())
        return state

    def wait_state(self, job_id: str | int, states: str | Collection[str], timeout: float = 60) -> str:
        """Wait until a job is in (one of) `states` and return which; TimeoutError with what became of it otherwise.

        One that has ended in another state is not waited for.
        """
        wanted = {states} if isinstance(states, str) else set(states)
        until = time.monotonic() + timeout
        while (state := self.job_state(job_id)) not in wanted:
            if state in FINAL or time.monotonic() > until:
                job = self.run("scontrol", "show", "job", str(job_id))
                raise TimeoutError(f"job {job_id} is {state}, not {sorted(wanted)}\n{job}")
            time.sleep(0.05)
        return state

    def start_now(self, job_id: str | int) -> None:
        """Spare a requeued job its delay, once it waits."""
        self.wait_state(job_id, "PENDING")
        # slurmd still refuses a credential that is dated with the second in which the last one was revoked
        time.sleep(1.01 - time.time() % 1)
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")

    def wait_idle(self, timeout: float = 60) -> None:
        """Wait until no job waits or runs and every node can take one."""
        until = time.monotonic() + timeout
        while self.run("squeue", "-h") or set(self.run("sinfo", "-h", "-p", "main", "-o", "%T").split()) != {"idle"}:
            if time.monotonic() > until:
                raise TimeoutError(f"not idle after {timeout:.0f} s\n{self.run('sinfo', '-N')}{self.run('squeue')}")
            time.sleep(0.05)

    def set_down(self, node: str, timeout: float = 60) -> None:
        """Take a node away, as if it had died: once its jobs have left it, requeued or as NODE_FAIL.

        What slurmctld hears from the node of a job's last attempt it takes as said of the next one, which then loses
        the node, and waits in srun for ever.
        """
        jobs = self.run("squeue", "-h", "-t", "RUNNING", "-w", node, "-o", "%A").split()
        log = self.folder / "log" / "slurmctld.log"
        read, until = log.stat().st_size, time.monotonic() + timeout
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
        while missed := [job for job in jobs if f"epilog_complete: JobId={job} Node={node} " not in said(log, read)]:
            if time.monotonic() > until:
                raise TimeoutError(f"{node} has not ended {missed} after {timeout:.0f} s\n{said(log, read)}")
            time.sleep(0.05)

    def resume(self, node: str) -> None:
        """Give a node back."""
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def stop(self) -> None:
        """End all daemons and jobs and delete the folder."""
        said, _ = self.daemons.communicate(timeout=120)  # which closes its standard input
        if self.daemons.returncode:
            raise RuntimeError(f"the cluster ended with {self.daemons.returncode}: {said}")


def said(log: Path, start: int) -> str:
    """What a daemon has written since its log had this size."""
    return log.read_bytes()[start:].decode(errors="replace")


@contextmanager
def cluster(nodes: int = 2, cpus: int = 4) -> Iterator[Cluster]:
    """A cluster of so many nodes, with so many CPUs each (claimed: nothing is bound), for the length of the block."""
    daemons = subprocess.Popen(
        [sys.executable, slurm_daemons.__file__, str(nodes), str(cpus)],
        env=environment(PATH=PATH), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    assert daemons.stdout is not None
    said = daemons.stdout.readline()
    if not said.startswith("ready "):
        raise RuntimeError(f"SLURM did not start: {said}{daemons.stdout.read()}")
    started = Cluster(Path(said.split()[1]), slurm_daemons.node_names(nodes), daemons)
    try:
        yield started
    finally:
        started.stop()
