"""The sweep's loop with made-up trials: how many run, what is entered, and that it can be killed at any moment."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dvae.config.tool_arguments import split_arguments
from dvae.errors import MachineError, UserError
from dvae.experiments.sweeps import sweep_loop
from dvae.experiments.sweeps.sweep_loop import Sweep, SweepToolConfig, count_done
from dvae.experiments.sweeps.sweep_spec import SweepSpec, key
from dvae.experiments.sweeps.trial_processes import RunningTrial, TrialProcesses
from dvae.experiments.sweeps.trials import SweepFolder, Trial, TrialState
from dvae.tracking.metrics_log import MetricsLog

STEPS = 4
COMMAND = ["${interpreter}", "${program}", "recipe=demo", "run=somewhere", "${args_no_hyphens}"]


def spec_of(method: str = "random", values: tuple[int, ...] = tuple(range(1, 60)), **more: Any) -> SweepSpec:
    parameters = {"seed": {"values": list(values)}}
    metric = {"name": "refiner/loss", "goal": "minimize"}
    return SweepSpec("made-up", {
        "method": method, "metric": metric, "parameters": parameters, "program": "tools/launch.py", "command": COMMAND,
        **more,
    })  # fmt: skip


@dataclass
class MadeUp(TrialProcesses):
    """Trials that take STEPS looks, a row of metrics each: loss = seed / step. `status` says how a trial ends by its
    number, `crash` after how many looks the sweep itself is gone."""

    parallel: int = 2
    status: dict[int, int] = field(default_factory=dict)
    crash: int = -1
    metric: str = "loss"
    value: float | None = None
    running: dict[int, RunningTrial] = field(default_factory=dict)
    most: int = 0
    started: list[int] = field(default_factory=list)

    def start(self, number: int, command: list[str], log: Path) -> None:
        words = dict(word.partition("=")[::2] for word in command if "=" in word)
        folder = Path(words["run"])
        folder.mkdir(exist_ok=True)
        log.write_text("dvae: refiner ...\ndvae: error: made up\n", encoding="utf-8")
        process: Any = SimpleNamespace(
            status=None, folder=folder, seed=int(words["seed"]), send_signal=lambda number: None
        )
        self.running[number] = RunningTrial(process, log, 0.0, 0)
        self.started.append(number)
        self.most = max(self.most, len(self.running))

    def ended(self) -> dict[int, RunningTrial]:
        if self.crash == 0:
            raise KeyboardInterrupt
        self.crash -= 1
        gone = {}
        for number, running in list(self.running.items()):
            process: Any = running.process
            metrics = MetricsLog(process.folder / "metrics.jsonl")
            step = len(metrics.rows()) + 1
            if step > STEPS or running.asked_to_stop or (number in self.status and step == 2):
                process.status = 143 if running.asked_to_stop else self.status.pop(number, 0)
                gone[number] = self.running.pop(number)
            else:
                loss = process.seed / step if self.value is None else self.value
                metrics.append({"stage": "refiner", "step": step, self.metric: loss})
        return gone


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_loop, "POLL_SECONDS", 0.0)


def sweep_in(path: Path, processes: MadeUp, spec: SweepSpec | None = None, **settings: int) -> Sweep:
    folder = SweepFolder(path / "out")
    folder.open((spec or spec_of()).sweep, [])
    given = SweepToolConfig(sweep="made-up", parallel=processes.parallel, **settings)  # type: ignore[arg-type]
    return Sweep(spec or spec_of(), folder, [], processes, given)


@pytest.mark.parametrize("parallel", [1, 2, 5, 9])
def test_exactly_count_trials_and_never_more_at_a_time_than_parallel(tmp_path: Path, parallel: int) -> None:
    processes = MadeUp(parallel)
    made = sweep_in(tmp_path, processes, n=7).run()
    assert [trial.state for trial in made] == [TrialState.finished] * 7
    assert processes.most == min(parallel, 7)
    assert all(trial.metric == trial.parameters["seed"] / STEPS for trial in made)
    assert SweepFolder(tmp_path / "out").trials() == made
    assert sorted(path.name for path in (tmp_path / "out").glob("trial-*")) == [f"trial-000{n}" for n in range(1, 8)]


@pytest.mark.parametrize("crash", range(14))
def test_killed_at_any_look_it_goes_on_and_ends_with_count(tmp_path: Path, crash: int) -> None:
    whole = sweep_in(tmp_path / "whole", MadeUp(2), n=6).run()
    with pytest.raises(KeyboardInterrupt):
        sweep_in(tmp_path, MadeUp(2, crash=crash), n=6).run()
    unfinished = [trial.number for trial in SweepFolder(tmp_path / "out").trials() if trial.state is TrialState.running]
    processes = MadeUp(2)
    made = sweep_in(tmp_path, processes, n=6).run()
    assert processes.started[: len(unfinished)] == unfinished  # those first
    assert [trial.state for trial in made] == [TrialState.finished] * 6
    assert [trial.parameters for trial in made] == [trial.parameters for trial in whole]


def test_a_larger_count_adds_trials_to_those_that_there_are(tmp_path: Path) -> None:
    first = sweep_in(tmp_path, MadeUp(2), n=3).run()
    processes = MadeUp(2)
    assert sweep_in(tmp_path, processes, n=5).run()[:3] == first
    assert processes.started == [4, 5]


def test_a_failed_trial_is_recorded_replaced_and_never_tried_again(tmp_path: Path) -> None:
    processes = MadeUp(2, status={2: 1})
    made = sweep_in(tmp_path, processes, n=4).run()
    assert [trial.state for trial in made] == [TrialState.finished, TrialState.failed, *[TrialState.finished] * 3]
    assert made[1].message == "exit status 1: dvae: error: made up"
    assert made[1].metric is None
    assert processes.started == [1, 2, 3, 4, 5]
    again = MadeUp(2)
    assert sweep_in(tmp_path, again, n=4).run() == made
    assert again.started == []


def test_too_many_failures_end_the_sweep_in_one_line(tmp_path: Path) -> None:
    processes = MadeUp(1, status=dict.fromkeys(range(1, 9), 2))
    with pytest.raises(MachineError, match=r"^2 trials failed, the last of them trial-0002 with exit status 2: dvae"):
        sweep_in(tmp_path, processes, n=4, failures=2).run()
    assert processes.started == [1, 2]


def test_a_trial_that_somebody_stopped_is_taken_up_again(tmp_path: Path) -> None:
    processes = MadeUp(1, status={1: 143})
    made = sweep_in(tmp_path, processes, n=2).run()
    assert processes.started == [1, 1, 2]
    assert [trial.state for trial in made] == [TrialState.finished, TrialState.finished]


def test_a_metric_that_nobody_measures_ends_the_sweep_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metric 'refiner/loss' is not measured by .*did you mean 'refiner/los'"):
        sweep_in(tmp_path, MadeUp(1, metric="los"), n=2).run()


def test_a_metric_that_is_not_finite_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="refiner/loss was not a finite number"):
        sweep_in(tmp_path, MadeUp(1, value=float("nan")), n=2, failures=1).run()
    (trial,) = SweepFolder(tmp_path / "out").trials()
    assert (trial.state, trial.metric) == (TrialState.failed, None)


def test_hyperband_ends_trials_early_and_they_count(tmp_path: Path) -> None:
    """With the first two trials at hand, later ones go on only if they are among the better half at step 2."""
    spec = spec_of("grid", (4, 2, 9, 1), early_terminate={"type": "hyperband", "min_iter": 2, "eta": 2})
    made = sweep_in(tmp_path, MadeUp(1), spec, n=4).run()
    # after two rows: 2; 1 <= 2; 4.5 > sorted(1, 2, 4.5)[1] = 2; 0.5
    assert [trial.state for trial in made] == [
        TrialState.finished,
        TrialState.finished,
        TrialState.stopped,
        TrialState.finished,
    ]
    assert made[2].metric == 9 / 2
    assert count_done(made) == 4
    assert len(MetricsLog(tmp_path / "out" / "trial-0003" / "metrics.jsonl").rows()) == 2


def test_a_grid_ends_when_it_has_no_more(tmp_path: Path) -> None:
    made = sweep_in(tmp_path, MadeUp(2), spec_of("grid", (3, 4, 5)), n=9).run()
    assert [trial.parameters["seed"] for trial in made] == [3, 4, 5]
    assert count_done(made) == 3


def test_the_summarys_figures_come_before_the_rows(tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path, MadeUp(1), n=1)
    trial = Trial(1, {"seed": 3})
    sweep.folder.run(trial).mkdir()
    figures = {"figures": {"refiner/loss": 0.125}}
    (sweep.folder.run(trial) / "summary.json").write_text(json.dumps(figures), encoding="utf-8")
    assert sweep.final_metric(trial) == 0.125


def test_the_command_of_a_trial(tmp_path: Path) -> None:
    words = spec_of().command({"seed": 3}, ["refiner.width=8", "run=out/trial-0001"])
    assert [key(word) for word in words[2:]] == ["recipe", "seed", "refiner.width", "run"]
    assert words[-1] == "run=out/trial-0001"


class TestFolder:
    def test_another_sweep_or_other_words_are_refused(self, tmp_path: Path) -> None:
        folder = SweepFolder(tmp_path / "out")
        folder.open({"method": "grid"}, ["a=1"])
        folder.open({"method": "grid"}, ["a=1"])
        for sweep, words in (({"method": "random"}, ["a=1"]), ({"method": "grid"}, [])):
            with pytest.raises(UserError, match="holds a sweep of another file or other overrides: use another out="):
                folder.open(sweep, words)

    def test_a_folder_that_is_no_sweep_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "letter.txt").write_text("dear", encoding="utf-8")
        with pytest.raises(UserError, match="exists and is not a sweep"):
            SweepFolder(tmp_path).open({}, [])

    def test_two_sweeps_cannot_share_it(self, tmp_path: Path) -> None:
        folder = SweepFolder(tmp_path / "out")
        folder.open({}, [])
        code = (
            "import sys; from pathlib import Path; from dvae.experiments.sweeps.trials import SweepFolder\n"
            "with SweepFolder(Path(sys.argv[1])).held(): print('held', flush=True); sys.stdin.read()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(UserError, match="is in use by another sweep"), folder.held():
                pass
            other.communicate()
        with folder.held():
            pass

    def test_damage_is_named(self, tmp_path: Path) -> None:
        folder = SweepFolder(tmp_path / "out")
        folder.open({}, [])
        (folder.path / "trials.json").write_text("[{", encoding="utf-8")
        with pytest.raises(MachineError, match=r"trials\.json: is damaged"):
            folder.trials()

    def test_trials_are_kept_whole(self, tmp_path: Path) -> None:
        folder = SweepFolder(tmp_path / "out")
        folder.open({}, [])
        kept = [
            Trial(1, {"a": [1, 2], "b": None}, TrialState.stopped, 0.5, 3.25),
            Trial(2, {"a": "x"}, TrialState.failed, message="?"),
        ]
        folder.keep(kept)
        assert folder.trials() == kept


class TestSettings:
    @pytest.mark.parametrize("words", [["n=0"], ["parallel=0"], ["failures=-1"]])
    def test_numbers_below_one_are_refused(self, words: list[str]) -> None:
        with pytest.raises(UserError, match=f"^{words[0]}: use 1 or more"):
            sweep_loop.sweep([], split_arguments(SweepToolConfig, ["sweep=demo", *words])[0])

    def test_fewer_than_are_finished_are_refused(self, tmp_path: Path) -> None:
        loaded = sweep_loop.spec.load("demo")
        folder = SweepFolder(tmp_path / "out")
        folder.open(loaded.sweep, [])
        folder.keep([Trial(n, {}, TrialState.finished, 1.0) for n in (1, 2, 3)])
        with pytest.raises(UserError, match=r"^n=2: .*out holds 3 finished trials already: use n=3 or more"):
            sweep_loop.sweep([], SweepToolConfig(sweep="demo", n=2, out=str(folder.path)))
