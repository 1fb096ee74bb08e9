"""A real SLURM of one user in a throw-away folder: python slurm_daemons.py NODES CPUS

Starts munged, mariadbd, slurmdbd, slurmctld and a slurmd per node (Debian 12: SLURM 22.05), says "ready FOLDER", and
runs until its standard input is closed: so also when the test that holds the other end was killed. Then it ends the
daemons and whatever jobs have left, and deletes the folder. No systemd, no cgroups; root is not needed.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from dvae.utils.child_processes import parent_death_signal

PR_SET_CHILD_SUBREAPER = 36
"""Linux, prctl(2): orphans among the descendants (slurmd leaves the steps of jobs) become this process's children."""
SQL = Path("/usr/share/mysql")
PATIENCE = 60.0
"""Seconds that a daemon has to come up."""
PORTS = range(10_000, 20_000)
"""Where ports are chosen: below those that Linux gives to clients, and below the MASTER_PORTs of submitit."""
FIRST_JOB = range(1_000, 60_000_000)
"""submitit derives MASTER_PORT from the job's number: two clusters side by side must not count from the same one."""

SLURM_CONF = """\
ClusterName=mini
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until its credential has expired
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
# tells when a node has ended a job
SlurmctldDebug=debug2
SlurmdPidFile={folder}/slurmd.%n.pid
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0,bf_interval=1
# believe CPUs and RealMemory below, whatever this machine has
SlurmdParameters=config_overrides
# a slurmd that is back makes its node usable again, but not one that set_down took away
ReturnToService=1
JobRequeue=1
KillOnBadExit=1
KillWait=2
MinJobAge=3600
FirstJobId={first_job}
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={database}
AccountingStoragePass={folder}/munge.sock
JobAcctGatherType=jobacct_gather/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=10
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
PartitionName=cpu Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=10
"""
# node names that are loopback addresses: what submitit makes of SLURM_JOB_NODELIST connects
NODE = "NodeName={name} NodeHostname=localhost NodeAddr={name} Port={port} CPUs={cpus} RealMemory=64000 Gres=gpu:2"
GRES_CONF = """\
Name=gpu File=/dev/null
Name=gpu File=/dev/zero
"""
SLURMDBD_CONF = """\
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={database}
SlurmUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
PidFile={folder}/slurmdbd.pid
"""
MARIADB = [
    "mariadbd",
    "--no-defaults",
    "--skip-log-bin",
    "--innodb-log-file-size=4M",
    "--innodb-buffer-pool-size=16M",
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-doublewrite=0",
    "--innodb-flush-method=nosync",
    "--innodb-use-native-aio=0",
]


def node_names(count: int) -> list[str]:
    return [f"127.0.0.{number}" for number in range(1, count + 1)]


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on now."""
    found: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if not trial.connect_ex(("127.0.0.1", port)):
                continue
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"fewer than {count} free ports in {PORTS}")


class Daemons:
    """Daemons in the foreground, children of this process, in the order of their start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "MYSQL_UNIX_PORT": str(folder / "my.sock"),
        }

    def log(self, name: str) -> Path:
        return self.folder / "log" / f"{name}.log"

    def start(self, name: str, command: list[str], ready: Callable[[], bool]) -> None:
        """Start a daemon and wait until it is ready, or raise RuntimeError with the end of its log."""
        with self.log(name).open("ab") as log:
            self.running[name] = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=parent_death_signal(),
            )  # fmt: skip
        self.wait(name, ready)

    def wait(self, name: str, ready: Callable[[], bool]) -> None:
        until = time.monotonic() + PATIENCE
        while not ready():
            ended = [f"{other} ended ({p.returncode})" for other, p in self.running.items() if p.poll() is not None]
            if ended or time.monotonic() > until:
                what = ", ".join(ended) or f"{name} was not ready after {PATIENCE:.0f} s"
                raise RuntimeError(f"{what}\n{self.last_words()}")
            time.sleep(0.02)

    def last_words(self, lines: int = 15) -> str:
        """The end of each log."""
        tails = []
        for path in sorted(self.folder.glob("log/*.log")):
            tails += [f"--- {path.name}", *path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]]
        return "\n".join(tails)

    def stop(self) -> None:
        """End them, the last one first, and what they leave: slurmd, the steps of its jobs."""
        for name in reversed(list(self.running)):
            self.end(name)
            self.end_orphans()

    def end(self, name: str) -> None:
        process = self.running.pop(name)
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def end_orphans(self) -> None:
        """Kill children that are no daemons, and theirs, which then become children of this process."""
        known = {process.pid for process in self.running.values()}
        while orphans := [child for child in psutil.Process().children() if child.pid not in known]:
            for orphan in orphans:
                orphan.kill()
            psutil.wait_procs(orphans)


def listening(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0


def accepts(path: Path) -> bool:
    """Whether somebody listens on this unix socket."""
    with socket.socket(socket.AF_UNIX) as trial:
        return path.exists() and trial.connect_ex(str(path)) == 0


def write(folder: Path, nodes: list[str], cpus: int) -> tuple[int, int]:
    """Folders, key and configuration; returns the ports of slurmctld and slurmdbd."""
    for name in ("state", "log", "db", *(f"spool/{node}" for node in nodes)):
        (folder / name).mkdir(parents=True)
    user = pwd.getpwuid(os.getuid()).pw_name
    controller, database, *ports = free_ports(2 + len(nodes))
    lines = [NODE.format(name=name, port=port, cpus=cpus) for name, port in zip(nodes, ports, strict=True)]
    common = {"folder": folder, "user": user, "database": database}
    first_job = random.SystemRandom().choice(FIRST_JOB)
    private(folder / "munge.key", os.urandom(128))
    private(folder / "slurmdbd.conf", SLURMDBD_CONF.format(**common).encode())
    conf = SLURM_CONF.format(**common, controller=controller, first_job=first_job, nodes="\n".join(lines))
    (folder / "slurm.conf").write_text(conf, encoding="utf-8")
    (folder / "gres.conf").write_text(GRES_CONF, encoding="utf-8")
    # without it slurmd looks for cgroup/v2, and dies where there is none
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n", encoding="utf-8")
    return controller, database


def private(path: Path, content: bytes) -> None:
    """A file that only this user may read, as munged and slurmdbd demand."""
    path.touch(mode=0o600)
    path.write_bytes(content)


def start_database(daemons: Daemons) -> None:
    """An empty MariaDB that answers on a unix socket only."""
    folder = daemons.folder
    mariadb = [*MARIADB, f"--user={pwd.getpwuid(os.getuid()).pw_name}", f"--datadir={folder}/db"]
    sql = b"create database if not exists mysql;\nuse mysql;\nSET @auth_root_socket=NULL;\n"
    sql += (SQL / "mysql_system_tables.sql").read_bytes() + (SQL / "mysql_system_tables_data.sql").read_bytes()
    made = subprocess.run(
        [*mariadb, "--bootstrap"], input=sql, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder, check=False
    )
    if made.returncode:
        raise RuntimeError(f"mariadbd --bootstrap ended ({made.returncode})\n{made.stdout.decode()[-3000:]}")
    served = folder / "my.sock"
    command = [*mariadb, "--skip-grant-tables", "--skip-networking", f"--socket={served}"]
    daemons.start("mariadbd", command, lambda: accepts(served))


def start(daemons: Daemons, nodes: list[str], cpus: int) -> None:
    """Everything, each once that is there which it needs."""
    folder = daemons.folder
    controller, database = write(folder, nodes, cpus)
    files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munge.pid"}
    files |= {"log-file": "log/munged-own.log", "seed-file": "munge.seed"}
    munged = ["munged", "--force", "--foreground", *(f"--{option}={folder}/{name}" for option, name in files.items())]
    daemons.start("munged", munged, lambda: accepts(folder / "munge.sock"))
    start_database(daemons)
    daemons.start("slurmdbd", ["slurmdbd", "-D"], lambda: listening(database))
    daemons.start("slurmctld", ["slurmctld", "-D"], lambda: listening(controller))
    for node in nodes:
        daemons.start(f"slurmd.{node}", ["slurmd", "-D", "-N", node], lambda: True)

    def idle() -> bool:
        command = ["sinfo", "-h", "-N", "-p", "main", "-o", "%T"]
        return subprocess.check_output(command, env=daemons.environment, text=True).split() == ["idle"] * len(nodes)

    daemons.wait("slurmd", idle)


@contextmanager
def serving(nodes: int, cpus: int) -> Iterator[Path]:
    """The folder of a cluster, and after the block nothing of it."""
    folder = Path(tempfile.mkdtemp(prefix="dvae-slurm", dir="/tmp"))  # sockets lie in it: a long path is refused
    daemons = Daemons(folder)
    try:
        start(daemons, node_names(nodes), cpus)
        yield folder
    finally:
        daemons.stop()
        shutil.rmtree(folder)


def main(nodes: str, cpus: str) -> None:
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1):
        raise RuntimeError("this Linux has no PR_SET_CHILD_SUBREAPER")
    try:
        with serving(int(nodes), int(cpus)) as folder:
            print("ready", folder, flush=True)
            sys.stdin.read()
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
