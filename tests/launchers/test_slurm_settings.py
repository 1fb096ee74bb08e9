"""What is asked of SLURM, and what its words mean; no SLURM is needed for that."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests_support import dry_run

from dvae.config import compose as configuration
from dvae.errors import MachineError, UserError
from dvae.launchers.slurm import Slurm, hidden_job_environment, sbatch_error, time_limit_minutes
from dvae.runs import attempts, manage
from dvae.runs.attempts import Attempt
from dvae.runs.manage import RunState
from dvae.runs.records import write_format
from dvae.runs.slurm import queue, rank, supervisor
from dvae.runs.slurm.queue import SlurmJob, SubmittedJob
from dvae.runs.slurm.supervisor import Supervisor, attempts_without_progress, exit_status_of, task_numbers


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 90), ("90:00", 90), ("90:01", 91), ("1:30:00", 90), ("24:00:00", 1440), ("2-0", 2880), ("1-01:30", 1530),
     ("1-01:30:01", 1531), ("0:30", 1)],
)  # fmt: skip
def test_time_limits_are_slurms(time: str, expected: int) -> None:
    assert time_limit_minutes(time) == expected


@pytest.mark.parametrize("time", ["", "a day", "1:2:3:4", "-5", "0", "1-"])
def test_what_is_no_time_limit(time: str) -> None:
    with pytest.raises(UserError, match=f"^launcher.time={time}: use "):
        time_limit_minutes(time)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launcher.nodes=0"], "launcher.nodes=0: use 1 or more"),
        (["launcher.start_seconds=0"], "launcher.start_seconds=0: use 1 or more"),
        (["launcher.gpus_per_node=-1"], "launcher.gpus_per_node=-1: use 0 or more"),
        (["launcher.time=2", "launcher.signal_seconds=120"], "launcher.time=2 leaves no time before"),
        (["launcher.node=2"], "unknown field 'launcher.node': did you mean 'nodes'"),
        (["launcher.hang_seconds=-1"], "launcher.hang_seconds=-1: use 0"),
    ],
)
def test_wrong_settings_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        configuration.to_run_config(configuration.compose("train", ["recipe=demo", "launcher=slurm", *words]))


def sbatch(tiny: list[str], *words: str) -> list[str]:
    """The sbatch files that a dry run prints, one each."""
    text = dry_run(configuration.compose("train", [*tiny, "run=runs/x", "launcher=slurm", *words]))
    return text.split("--- sbatch file of ")[1:]


def test_a_dry_run_prints_the_sbatch_file_and_writes_nothing(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (text,) = sbatch(
        tiny, "launcher.nodes=2", "launcher.gpus_per_node=2", "launcher.time=2-0", "launcher.partition=gpu",
        "launcher.account=lab", "launcher.qos=high", "launcher.mem=64G", "launcher.constraint=a100",
        "launcher.reservation=r", "launcher.exclude=bad1", "launcher.comment=hello",
        'launcher.setup=["module load cuda"]', 'launcher.sbatch=["--mail-type=FAIL","--exclusive"]', "dry_run=true",
    )  # fmt: skip
    assert not list(tmp_path.iterdir())
    lines = text.splitlines()
    for option in (
        "nodes=2", "ntasks-per-node=2", "gpus-per-node=2", "cpus-per-task=4", "time=2880", "partition=gpu",
        "account=lab", "qos=high", "mem=64G", "constraint=a100", "reservation=r", "exclude=bad1", "comment=hello",
        "mail-type=FAIL", "exclusive", "signal=USR2@120", "requeue", "job-name=dvae-x",
        f"output={tmp_path}/runs/x/slurm/%j/%j_0_log.out",
    ):  # fmt: skip
        assert f"#SBATCH --{option}" in lines
    assert lines.index("module load cuda") < next(n for n, line in enumerate(lines) if line.startswith("exec "))


def test_a_chain_asks_for_gpus_only_where_they_are_used(tiny: list[str]) -> None:
    words = ["launcher.chain=true", "launcher.nodes=2", "launcher.gpus_per_node=8", "launcher.array_jobs=3"]
    stages = "stages=[shards,encoder,prior,cache,refiner,evaluate]"
    files = sbatch(
        tiny, *words, "launcher.cpu_partition=cpu", stages, "train_encoder.batch=16", "train_refiner.batch=16"
    )
    kinds = [text.splitlines()[0] for text in files]
    assert kinds == ["shards", "shards", "encoder, prior", "cache", "cache", "refiner", "evaluate"]
    array, publish, encoder, more, cache, _, evaluate = files
    assert "#SBATCH --array=0-2%3" in array
    assert "#SBATCH --array=0-2%3" in more
    for text in (array, publish, more, cache):
        assert "#SBATCH --partition=cpu" in text
        assert "gpus" not in text
        assert "#SBATCH --nodes=1" in text
    assert "#SBATCH --ntasks-per-node=8" in encoder
    assert "#SBATCH --gpus-per-node=1" in evaluate
    assert "#SBATCH --nodes=1" in evaluate


def test_the_number_of_ranks_is_checked_before_anything_is_queued(tiny: list[str]) -> None:
    with pytest.raises(UserError, match="batch 8 does not divide into 3 ranks"):
        sbatch(tiny, "launcher.nodes=3")


def test_outside_any_job_slurms_variables_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_CONF", "there")
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    monkeypatch.setenv("MASTER_PORT", "1")
    with hidden_job_environment():
        assert "SLURM_JOB_ID" not in os.environ
        assert "MASTER_PORT" not in os.environ
        assert (os.environ["SLURM_CONF"], os.environ["SBATCH_ACCOUNT"]) == ("there", "mine")
    assert os.environ["SLURM_JOB_ID"] == "1"


def test_what_sbatch_says_is_one_line() -> None:
    error = RuntimeError(
        "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: no"
    )
    assert sbatch_error(error) == "invalid partition specified: x Batch job submission failed: no"


def test_a_machine_without_slurm_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"^launcher=slurm: there is no squeue here"):
        Slurm(Slurm.Config(name="slurm")).launch(tmp_path)


@pytest.mark.parametrize(
    ("how", "status"),
    [("Killed", -9), ("Terminated", -15), ("Exited with exit code 75", 75), ("Exited with exit code 140", -12),
     ("Segmentation fault (core dumped)", -11), ("User defined signal 2", -12), ("Out Of Memory", -9)],
)  # fmt: skip
def test_sruns_words_for_an_end(how: str, status: int) -> None:
    assert exit_status_of(how) == status


def test_sruns_words_for_tasks() -> None:
    assert [task_numbers(text) for text in ("3", "0-2,5", "[1,3-4]")] == [[3], [0, 1, 2, 5], [1, 3, 4]]
    found = supervisor.FAILED.search("srun: error: node-a12: tasks 0-1,3: Exited with exit code 1")
    assert found is not None
    assert (found["host"], found["tasks"], found["how"]) == ("node-a12", "0-1,3", "Exited with exit code 1")


def attempt(started: float, job: str = "7", status: int = 1) -> Attempt:
    return Attempt(
        started=started, host="h", pid=1, launcher="slurm", count=2, cwd="/", job=job, ended=started + 1,
        status=status, message="its last words",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("started", "kept", "times"),
    [
        ([10], 0, 1),
        ([10, 20, 30], 0, 3),
        ([10, 20, 30], 15, 3),  # the first kept something, the two after it nothing
        ([10, 20, 30], 25, 2),
        ([10, 20, 30], 35, 1),
    ],
)
def test_attempts_in_vain_begin_with_the_last_that_kept_any(started: list[float], kept: float, times: int) -> None:
    assert attempts_without_progress([attempt(5, job="6"), *(attempt(when) for when in started)], "7", kept) == times


def test_too_many_attempts_in_vain_end_the_job(tmp_path: Path) -> None:
    attempts.write(tmp_path, [attempt(time.time() - 20), attempt(time.time() - 10)])
    decide = Supervisor(str(tmp_path)).check_attempts_left
    assert decide("7", 3, MachineError("rank 1 was killed")) == 2
    with pytest.raises(MachineError, match=r"killed; that was attempt 2 of launcher.max_attempts=2 that got no"):
        decide("7", 2, MachineError("rank 1 was killed"))
    (tmp_path / "checkpoints" / "encoder" / "step-00000002").mkdir(parents=True)
    assert decide("7", 2, MachineError("rank 1 was killed")) == 1


def test_a_ranks_variables() -> None:
    given = {
        "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_CPUS_PER_TASK": "8",
    }  # fmt: skip
    found = rank.torch_environment(given)
    assert found == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "8",
    }  # fmt: skip
    assert "OMP_NUM_THREADS" not in rank.torch_environment(given | {"OMP_NUM_THREADS": "1"})


def test_jobs_tell_a_runs_state_where_locks_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text("run: x\nstages: [encoder]\ntrain_encoder: {steps: 5, batch: 8}\n")
    write_format(tmp_path)
    jobs = [
        SlurmJob(id="12", state="PENDING", reason="Priority"),
        SlurmJob(id="13", state="PENDING", reason="Dependency"),
    ]
    status = manage.run_status(tmp_path, jobs)
    assert (status.state, status.message) == (RunState.waiting, "job 12 waits (Priority), 1 more after it")
    attempts.write(tmp_path, [attempt(time.time() - 20)])
    assert manage.run_status(tmp_path, jobs[:1]).message.startswith("job 12 waits (Priority); last attempt: ")
    status = manage.run_status(tmp_path, [SlurmJob(id="12", state="RUNNING", reason="None")])
    assert (status.state, status.message) == (RunState.running, "job 12 is running")
    assert manage.run_status(tmp_path, []).state is RunState.failed
    over = SlurmJob(id="12", state="COMPLETED", reason="None")
    assert manage.run_status(tmp_path, [over]).message == manage.run_status(tmp_path, []).message
    monkeypatch.setattr(queue, "active_jobs", lambda folder: jobs)
    with pytest.raises(UserError, match="has a job already, 12, pending"):
        manage.refuse_busy(tmp_path)


def test_jobs_that_end_before_an_attempt_begins_are_a_failure(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: x\nstages: [shards, encoder]\ntrain_encoder: {steps: 5, batch: 8}\n")
    write_format(tmp_path)
    (tmp_path / queue.FOLDER).mkdir()
    queue.record_jobs(tmp_path, [SubmittedJob(id="12", stages=["shards"], submitted=time.time() - 9)])
    tasks = [
        SlurmJob(id="12_0", state="COMPLETED", reason="None"),
        SlurmJob(id="12_1", state="FAILED", reason="NonZeroExitCode"),
    ]
    status = manage.run_status(tmp_path, tasks)
    assert (status.state, status.message.partition(",")[0]) == (RunState.failed, "job 12_1 ended as FAILED")
    assert manage.run_status(tmp_path, []).message.startswith("job 12 is gone, and no attempt started after it")
    attempts.write(tmp_path, [attempt(time.time(), status=143)])
    assert manage.run_status(tmp_path, tasks).state is RunState.stopped


def test_cancel_cancels_what_waits_and_arrays_and_stops_what_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(queue, "cancel_job", lambda job: done.append(f"cancel {job}"))
    monkeypatch.setattr(queue, "terminate", lambda job: done.append(f"stop {job}"))
    monkeypatch.setattr(queue, "jobs_by_run", lambda folders: {tmp_path: jobs if not done else []})
    states = [("12_0", "RUNNING"), ("12_[1-3%4]", "PENDING"), ("13", "PENDING")]
    jobs = [SlurmJob(id=number, state=state, reason="") for number, state in states]
    assert list(manage.cancel(tmp_path)) == [f"{tmp_path}: job {number} is canceled" for number in ("12", "13")]
    assert done == ["cancel 12", "cancel 13"]
    done, jobs = [], [SlurmJob(id="14", state="RUNNING", reason="")]
    attempts.write(tmp_path, [attempt(time.time(), status=143)])
    assert len(list(manage.cancel(tmp_path))) == 2
    assert done == ["stop 14"]


def test_jobs_are_kept_in_the_run_folder(tmp_path: Path) -> None:
    assert queue.submitted_jobs(tmp_path) == []
    first, second = (SubmittedJob(id=number, stages=["encoder"], submitted=1.0) for number in ("1", "2"))
    (tmp_path / queue.FOLDER).mkdir()
    queue.record_jobs(tmp_path, [first])
    queue.record_jobs(tmp_path, [second])
    assert queue.submitted_jobs(tmp_path) == [first, second]
    assert queue.submitted_jobs(tmp_path / "other") == []


JOB: dict[str, object] = {"id": "12", "stages": ["encoder"], "submitted": 1.0}


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "null", "{}", '[{"id": "1", "id": "2"}]', json.dumps([{"id": "1"}]), json.dumps([JOB | {"id": 1}]),
        json.dumps([JOB | {"id": "--user=root"}]), json.dumps([JOB | {"id": "1,2"}]), json.dumps([JOB | {"id": "1\n"}]),
        json.dumps([JOB | {"id": ""}]), json.dumps([JOB | {"stages": "encoder"}]), json.dumps([JOB | {"stages": [1]}]),
        json.dumps([JOB | {"submitted": "now"}]), json.dumps([JOB | {"submitted": 1e300}]), "[" * 100_000, "\xff",
    ],
)  # fmt: skip
def test_damaged_jobs_are_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / queue.FOLDER / queue.FILE
    path.parent.mkdir()
    path.write_text(text, encoding="latin-1")
    with pytest.raises(MachineError) as error:
        queue.submitted_jobs(tmp_path)
    assert str(error.value).startswith(f"{path}: is damaged (")
    assert str(error.value).endswith("; delete it to go on, the run is safe")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_jobs_that_are_no_file_are_one_line(tmp_path: Path, make: Callable[[Path], None]) -> None:
    (tmp_path / queue.FOLDER).mkdir()
    make(tmp_path / queue.FOLDER / queue.FILE)
    with pytest.raises(MachineError, match=r"jobs\.json: is damaged \(is a \w+, not a file\)"):
        queue.submitted_jobs(tmp_path)


LAUNCHER = "{max_attempts: 3, retry_seconds: 30, start_seconds: 600, signal_seconds: 120, python: '', srun: [], x: y}"


def test_the_supervisor_reads_the_settings_of_its_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PYTHON", "apptainer exec python")
    text = LAUNCHER.replace("python: ''", "python: '${oc.env:MY_PYTHON}'")
    (tmp_path / "config.yaml").write_text(f"launcher: {text}\nother: ${{oc.env:NOT_THERE}}\n")
    found = Supervisor(str(tmp_path)).settings()
    assert (found["max_attempts"], found["python"], found["x"]) == (3, "apptainer exec python", "y")


@pytest.mark.parametrize(
    "text",
    [
        "", "a: 1", "launcher: local", "launcher: [1]", "launcher: {}", "launcher: [", "launcher: {a: 1, a: 2}",
        f"launcher: {LAUNCHER.replace('3', 'many')}", f"launcher: {LAUNCHER.replace('3,', '0,', 1)}",
        f"launcher: {LAUNCHER.replace('[]', 'word')}", f"launcher: {LAUNCHER.replace('600', '.nan')}",
        f"launcher: {LAUNCHER.replace('y}', '${nothing}}')}", "launcher: !!python/object:os.system {}",
        "a: &a {}\nlauncher: *a",
    ],
)  # fmt: skip
def test_damaged_settings_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(MachineError) as error:
        Supervisor(str(tmp_path)).settings()
    assert str(error.value).startswith(f"{tmp_path / 'config.yaml'}: ")
    assert len(str(error.value).splitlines()) == 1
