"""Post-hoc averages: coefficients against quadrature, averages that were made against such that were really kept."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from tests_support import ROOT, environment
from torch import nn

from dvae.config import compose as config
from dvae.config.schema import EmaConfig, EmaProfile, Precision, TrainingConfig
from dvae.data.loading.loader import Batch
from dvae.errors import UserError, fold
from dvae.inference import pipeline
from dvae.tools.ema import command
from dvae.tracking.tracker import NoTracker
from dvae.training.ema_from_snapshots import (
    combine_snapshots,
    fit_average,
    profile_inner_products,
    solve_coefficients,
)
from dvae.training.engine.deepspeed_engine import start_distributed
from dvae.training.engine.ema import power_exponent
from dvae.training.engine.snapshot_writer import SnapshotWriter, to_half
from dvae.training.engine.snapshots import WeightSnapshot, list_snapshots, read_hashes
from dvae.training.loop import TrainHooks, train
from dvae.training.resilience.checkpoint import Checkpoints
from dvae.training.train_task import StepOutput, TrainTask
from dvae.utils import atomic_files, rng
from dvae.utils.weights import load_weights

WIDTHS = st.floats(0.01, 0.28)
STEPS, EVERY = 384, 12


def profile(t: float, step: float, gamma: float) -> float:
    return (gamma + 1) * (t / step) ** gamma / step if t <= step else 0.0


@settings(deadline=None)
@given(first=st.floats(1, 1000), second=st.floats(1, 1000), a=WIDTHS, b=WIDTHS)
def test_products_are_the_integrals_of_profiles(first: float, second: float, a: float, b: float) -> None:
    one, other = power_exponent(a), power_exponent(b)
    (closed,) = profile_inner_products(np.array([first]), np.array([one]), second, other)
    end = min(first, second)
    integral, _ = quad(lambda t: profile(t, first, one) * profile(t, second, other), 0.0, end, epsabs=0, epsrel=1e-9)
    assert closed == pytest.approx(integral, rel=1e-6)


def test_coefficients_against_least_squares_on_a_fine_grid() -> None:
    steps, widths = np.repeat(np.arange(1.0, 9.0) * 125, 2), np.tile([0.05, 0.1], 8)
    found, error = solve_coefficients(steps, widths, 1000, 0.15)
    times = (np.arange(10_000) + 0.5) / 10
    gammas = [power_exponent(width) for width in widths]
    kept = np.stack([[profile(t, step, gamma) for t in times] for step, gamma in zip(steps, gammas, strict=True)])
    wanted = np.array([profile(t, 1000, power_exponent(0.15)) for t in times])
    heavy = 1e4 * np.ones((1, len(steps)))  # a heavy last row: the coefficients add up to 1
    direct, *_ = np.linalg.lstsq(np.vstack([kept.T, heavy]), np.append(wanted, 1e4), rcond=None)
    np.testing.assert_allclose(found, direct, rtol=2e-3, atol=2e-4)
    assert found.sum() == pytest.approx(1.0, abs=1e-12)
    residual = np.linalg.norm(kept.T @ found - wanted) / np.linalg.norm(wanted)
    assert error == pytest.approx(residual, rel=1e-2)
    assert 0.02 < error < 0.05


@settings(deadline=None)
@given(width=st.floats(0.06, 0.2), count=st.sampled_from([8, 16, 32]))
def test_twice_the_snapshots_fit_at_least_three_times_better(width: float, count: int) -> None:
    errors = []
    for n in (count, 2 * count):
        steps = np.repeat(np.arange(1, n + 1) * (6400.0 / n), 2)
        found, error = solve_coefficients(steps, np.tile([0.05, 0.1], n), 6400, width)
        assert found.sum() == pytest.approx(1.0, abs=1e-9)
        errors.append(error)
    assert errors[1] < max(errors[0] / 3, 1e-5)


def test_snapshots_side_by_side_do_not_blow_up() -> None:
    steps = np.repeat(np.array([*(np.arange(1, 33) * 31_250.0), 1_000_001.0]), 2)
    found, error = solve_coefficients(steps, np.tile([0.05, 0.1], 33), 1_000_001, 0.15)
    assert error < 3e-3
    assert np.abs(found).sum() < 2


class Toy(TrainTask):
    """A small network that walks at random, or learns a noisy function."""

    name = "toy"

    def __init__(self, config: TrainingConfig, walk: bool) -> None:
        super().__init__(config, 0, torch.device("cpu"))
        torch.manual_seed(0)
        self.walk = walk
        self.module = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.BatchNorm1d(16), nn.Linear(16, 8))

    def modules(self) -> dict[str, nn.Module]:
        return {"toy": self.module}

    def loss(self, name: str, engines: Any, batch: Batch) -> StepOutput:
        x = rng.normal(0, "x", batch.keys.tolist(), (8,))
        y = engines[name](x)
        noise = rng.normal(0, "noise", batch.keys.tolist(), (8,))
        losses = (y * noise).mean(1) if self.walk else (y - x.sin().flip(1) - noise).square().mean(1)
        return StepOutput(losses.mean(), {"loss": (float(losses.detach().sum()), float(len(x)))})


class Numbers:
    """Batches without images; `fails` is a step before which the machine fails."""

    def __init__(self, fails: int = 0) -> None:
        self.fails = fails

    def step(self, sample: int) -> list[Batch]:
        if self.fails and sample == 4 * self.fails:
            raise KeyboardInterrupt
        keys = torch.arange(sample, sample + 4)
        return [Batch(keys, keys, torch.zeros(4, 0))]


def configured(**more: Any) -> TrainingConfig:
    ema = EmaConfig(profile=EmaProfile.power, extra_widths=[0.05, 0.15], extra_decays=[0.99], snapshot_every=EVERY)
    usual = {"steps": STEPS, "batch": 4, "lr": 1e-2, "precision": Precision.fp32, "ema": ema, "save_every": 10**6}
    return TrainingConfig(**usual | more)


def learn(run: Path, training: TrainingConfig, walk: bool = False, fails: int = 0) -> dict[str, torch.Tensor]:
    start_distributed()
    checkpoints = Checkpoints(run / "checkpoints" / "toy", keep=2)
    averaged, _ = train(Toy(training, walk), Numbers(fails), checkpoints, NoTracker(), TrainHooks(), run)
    return averaged["toy"]


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    names = [name for name in sorted(state) if name.endswith(("weight", "bias"))]
    return torch.cat([state[name].flatten().double() for name in names])


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Relative, in L2."""
    return float((flat(ours) - flat(theirs)).norm() / flat(theirs).norm())


@pytest.fixture(scope="module", params=["walk", "training"])
def snapshots(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[WeightSnapshot]:
    """Of widths 0.05, 0.1 and 0.15, and of a decay, at 32 steps."""
    run = tmp_path_factory.mktemp(request.param)
    learn(run, configured(), walk=request.param == "walk")
    return list_snapshots(run / "snapshots" / "toy")


def of_width(snapshots: list[WeightSnapshot], *widths: float) -> list[WeightSnapshot]:
    return [one for one in snapshots if one.spec.profile is EmaProfile.power and one.spec.value in widths]


def one_at(snapshots: list[WeightSnapshot], step: int, width: float) -> dict[str, torch.Tensor]:
    (only,) = [one for one in of_width(snapshots, width) if one.step == step]
    return load_weights(only.path)


@pytest.mark.parametrize("step", [STEPS, STEPS // 2])
def test_an_average_that_was_made_is_near_one_that_was_kept(snapshots: list[WeightSnapshot], step: int) -> None:
    """Within 3e-4, which is what fp16 leaves; two averages that were kept lie a hundred times further apart."""
    found = fit_average(of_width(snapshots, 0.05, 0.1), step, 0.15)
    made, kept = combine_snapshots(found, Toy(configured(), True).module), one_at(snapshots, step, 0.15)
    assert found.error < 1e-2
    assert distance(made, kept) < 3e-4
    assert distance(one_at(snapshots, step, 0.1), kept) > 1e-2
    assert all(value.dtype is torch.float32 for name, value in made.items() if name.endswith("weight"))
    assert int(made["2.num_batches_tracked"]) == step  # a buffer is taken as it was


def test_a_kept_width_is_made_exactly(snapshots: list[WeightSnapshot]) -> None:
    found = fit_average(of_width(snapshots, 0.05, 0.1), STEPS, 0.1)
    made = combine_snapshots(found, Toy(configured(), True).module)
    assert found.error < 1e-6
    assert distance(made, one_at(snapshots, STEPS, 0.1)) < 1e-6


def test_a_resumed_run_leaves_the_snapshots_of_one_that_was_never_stopped(tmp_path: Path) -> None:
    short = configured(steps=30, save_every=10, zero_stage=2)
    short = replace(short, ema=replace(short.ema, snapshot_every=8))
    learn(tmp_path / "whole", short)
    stopped = tmp_path / "stopped"
    seen = []
    for fails in (25, 20):
        with pytest.raises(KeyboardInterrupt):
            learn(stopped, short, fails=fails)
        seen.append(sorted({one.step for one in list_snapshots(stopped / "snapshots" / "toy")}))
    assert seen == [[8, 16, 24], [8, 16]]  # resumed from step 20
    learn(stopped, short)
    ours, theirs = (list_snapshots(run / "snapshots" / "toy") for run in (stopped, tmp_path / "whole"))
    assert [one.path.name for one in ours] == [one.path.name for one in theirs]
    assert sorted({one.step for one in ours}) == [8, 16, 24, 30]
    assert len(ours) == 4 * 4
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.path.read_bytes() == its.path.read_bytes(), mine.path.name
    assert read_hashes(ours[0].path.parent) == {one.path.name: atomic_files.sha256(one.path) for one in theirs}


def test_a_snapshot_whose_hash_a_kill_prevented_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends between a snapshot of step 16, where a checkpoint is due too, and its hash."""
    short = configured(steps=24, save_every=8)
    short = replace(short, ema=replace(short.ema, snapshot_every=8))
    learn(tmp_path / "whole", short)
    stopped, real = tmp_path / "stopped" / "snapshots" / "toy", SnapshotWriter._write_hashes

    def killed(self: SnapshotWriter, hashes: dict[str, str]) -> None:
        if any(name.startswith("step-00000016-width-0.15") for name in hashes):
            raise KeyboardInterrupt
        real(self, hashes)

    monkeypatch.setattr(SnapshotWriter, "_write_hashes", killed)
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "stopped", short)
    monkeypatch.undo()
    there = {one.path.name for one in list_snapshots(stopped)}
    assert there - read_hashes(stopped).keys() == {"step-00000016-width-0.15.safetensors"}
    learn(tmp_path / "stopped", short)
    assert read_hashes(stopped) == read_hashes(tmp_path / "whole" / "snapshots" / "toy")
    assert read_hashes(stopped) == {one.path.name: atomic_files.sha256(one.path) for one in list_snapshots(stopped)}
    assert len(read_hashes(stopped)) == 3 * 4


def test_parameters_alone_are_halved_and_only_within_range() -> None:
    state = {"a": torch.tensor([1.0]), "b": torch.tensor([1e5]), "buffer": torch.tensor([0.1])}
    kept = to_half(state, {"a", "b"})
    assert {name: value.dtype for name, value in kept.items()} == {
        "a": torch.float16, "b": torch.float32, "buffer": torch.float32,
    }  # fmt: skip


EMA = "train_refiner.ema"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """A whole tiny run; its main average has a power profile of width 0.1."""
    run = tmp_path_factory.mktemp("posthoc") / "run"
    words = [*tiny, f"{EMA}.extra_widths=[0.05]", f"{EMA}.extra_decays=[0.9]", f"{EMA}.snapshot_every=2", f"run={run}"]
    launched = [sys.executable, str(ROOT / "tools" / "launch.py"), *words]
    done = subprocess.run(launched, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.slow
def test_a_bundle_of_another_width_draws_images(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, out = tmp_path / "bundle", tmp_path / "weights.safetensors"
    command([f"run={finished}", "width=0.15", f"bundle={made}", f"out={out}"])
    said = capsys.readouterr().out
    assert "refiner: width 0.15 at step 6, from 6 snapshots; relative error of its profile 1" in said
    assert "that is a poor fit: take one of the steps [2, 4, 6]" in said
    drawn = pipeline.load(made)
    _, refined = drawn.generate(2, seed=0)
    assert refined.shape == (2, 3, 16, 16)
    weights, denoiser = load_weights(out), drawn.models.denoiser.state_dict()
    assert weights.keys() == denoiser.keys()
    assert all(torch.equal(value, denoiser[name]) for name, value in weights.items())
    assert distance(weights, load_weights(finished / "weights" / "denoiser.safetensors")) > 1e-4


@pytest.mark.slow
def test_the_width_of_the_run_and_a_decay_are_what_was_kept(finished: Path, tmp_path: Path) -> None:
    own = load_weights(finished / "weights" / "denoiser.safetensors")
    command([f"run={finished}", "width=0.1", f"out={tmp_path / 'same'}.safetensors"])
    assert distance(load_weights(tmp_path / "same.safetensors"), own) < 3e-4
    command([f"run={finished}", "decay=0.9", "step=4", f"out={tmp_path / 'kept'}.safetensors"])
    kept = load_weights(tmp_path / "kept.safetensors")
    snapshot = load_weights(finished / "snapshots" / "refiner" / "step-00000004-decay-0.9.safetensors")
    assert distance(kept, snapshot) == 0


MISTAKES = {
    ("out=o",): "set either width or decay: add width=0.15",
    ("width=0.15",): "nothing would be written: add out=FILE.safetensors or bundle=FOLDER",
    ("width=0.3", "out=o"): "width=0.3: use 0.005 to 0.28",
    ("width=0.15", "out=o", "stage=refner"): "unknown stage 'refner': did you mean 'refiner'?",
    ("width=0.15", "out=o", "stage=encoder"): "has no snapshots of its encoder: train with train_encoder.ema.snapshot",
    ("width=0.15", "out=o", "step=7"): "step=7: use 1 to 6, the step of the last snapshot",
    ("decay=0.99", "out=o"): "decay=0.99: no snapshot has this decay, they have 0.9: use one of these, or width=",
    ("decay=0.9", "out=o", "step=3"): "an average with constant profile exists at its snapshots only: use one of [2, 4",
    ("width=0.15", "bundle=."): "bundle=. is there already: name a folder that is not",
    ("width=0.15", "out=."): "out=. is a folder: name a file, or use bundle=",
    ("width=0.15", "out=o", "run=nowhere"): "run=nowhere: no run is there: name a run folder",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line(
    finished: Path, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        command([f"run={finished}", *words])
    assert MISTAKES[words] in fold(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_one_snapshot_is_too_few(finished: Path, tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "run" / "snapshots" / "refiner"
    folder.mkdir(parents=True)
    for name in ("config.yaml", "run.json", "snapshots/refiner/step-00000002-width-0.1.safetensors"):
        (run / name).write_bytes((finished / name).read_bytes())
    with pytest.raises(UserError, match=r"has 1 snapshots of power profile of its refiner, a fit needs 2"):
        command([f"run={run}", "width=0.15", f"out={tmp_path / 'o'}"])


REFUSED = {
    f"{EMA}.extra_widths=[0.3]": f"{EMA}.extra_widths=0.3: use 0.005 to 0.28",
    f"{EMA}.width=0": f"{EMA}.width=0: use 0.005 to 0.28",
    f"{EMA}.extra_decays=[1.0]": f"{EMA}.extra_decays=1: use 0 or more, and less than 1",
    f"{EMA}.extra_widths=[0.1]": f"{EMA}.extra_widths: there is another average of 0.1: name each once",
    f"{EMA}.snapshot_every=10": f"{EMA}.snapshot_every=10 needs two averages of power profile: add {EMA}.extra_widths",
}


@pytest.mark.parametrize("word", REFUSED)
def test_averages_that_are_none_are_refused_at_once(word: str, tiny: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        config.to_run_config(config.compose("train", [*tiny, word]))
    assert REFUSED[word] in fold(caught.value)
