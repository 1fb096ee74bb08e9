"""Distillation: targets with known answers, times, and whole rounds of a tiny run."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from closed_forms import IO, diffusion, normal
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests_support import dry_run, environment

from dvae.config import compose as configuration
from dvae.config import validate
from dvae.diffusion.kernels import Diffusion, Prediction
from dvae.diffusion.sampler_model import Threshold
from dvae.errors import UserError
from dvae.inference import pipeline
from dvae.registry.distillers.base import DISTILLERS
from dvae.registry.samplers.base import SAMPLERS, SamplerState

VP = diffusion("vp", "cosine")
every_distiller = pytest.mark.parametrize("name", DISTILLERS.names())


@dataclass
class Gaussian:
    """The exact denoiser of N(mean, variance) pixels, as a distiller calls it."""

    diffusion: Diffusion
    mean: float = 0.3
    variance: float = 0.25

    def predict(self, u: torch.Tensor, t: torch.Tensor, conditioning: object) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma = (getattr(self.diffusion, name)(t).view(-1, 1, 1, 1) for name in ("alpha", "sigma"))
        share = alpha * self.variance / (alpha**2 * self.variance + sigma**2)
        x0 = self.mean + share * (u - alpha * self.mean)
        return (u - alpha * x0) / sigma, x0


def build(name: str, **fields: object):
    return DISTILLERS.build({"name": name, **fields}, IO)


def draws(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(seed, n, 1, 1, 1), normal(seed + 1, n, 1, 1, 1)


def ddim(teacher: Gaussian, u: torch.Tensor, t: float, s: float) -> torch.Tensor:
    """The sampler's own step, or its last one."""

    class AtOneTime:
        diffusion, nfe_per_call = VP, 1

        def __call__(self, state: torch.Tensor, time: float, *, threshold: Threshold) -> Prediction:
            eps, x0 = teacher.predict(state, torch.tensor([time], dtype=torch.float64), None)
            return Prediction(eps, x0, VP.score_from_eps(eps, time))

    state = SamplerState(AtOneTime(), Threshold.none, lambda i: torch.zeros_like(u), [])
    return SAMPLERS.build({"name": "ddim"}, IO).step(state, u, t, s) if s > 0 else state.predict(u, t).x0


def test_a_progressive_step_is_two_of_the_teachers_ddim() -> None:
    distiller, teacher = build("progressive", start=8, end=4), Gaussian(VP)
    y0, eps = draws(8, 0)
    t, s = distiller.times(VP, 4, torch.arange(8, dtype=torch.float64) / 8, torch.zeros(8))
    target = distiller.target(teacher, y0, eps, t, s, None)
    u = VP.perturb(y0, t, eps)
    noise = (u - VP.alpha(t).view(-1, 1, 1, 1) * target) / VP.sigma(t).view(-1, 1, 1, 1)
    end = VP.perturb(target, s, noise)  # one step of DDIM with what the student is to see
    for i, (start, stop) in enumerate(zip(t.tolist(), s.tolist(), strict=True)):
        middle = (start + stop) / 2
        twice = ddim(teacher, ddim(teacher, u[i : i + 1], start, middle), middle, stop)
        torch.testing.assert_close(end[i], twice[0], rtol=1e-9, atol=1e-9)


@every_distiller
def test_of_a_single_image_every_target_is_that_image(name: str) -> None:
    """Where the data are one image, a denoiser sees it in every state: there is nothing to learn."""
    distiller, denoiser = build(name), Gaussian(VP, mean=0.7, variance=0.0)
    y0, eps = torch.full((256, 1, 1, 1), 0.7, dtype=torch.float64), normal(3, 256, 1, 1, 1)
    uniform, done = torch.rand(256, dtype=torch.float64), torch.rand(256, dtype=torch.float64)
    t, s = distiller.times(VP, distiller.rounds[0], uniform, done)
    error = denoiser.predict(VP.perturb(y0, t, eps), t, None)[1] - distiller.target(denoiser, y0, eps, t, s, None)
    assert error.abs().max() < 1e-8
    assert (distiller.loss(VP, error + 1.0, t, s) > 0).all()


@every_distiller
@given(uniform=st.floats(0, 1, exclude_max=True), done=st.floats(0, 1, exclude_max=True))
def test_times_go_down(name: str, uniform: float, done: float) -> None:
    distiller = build(name)
    for steps in distiller.rounds:
        t, s = distiller.times(VP, steps, *(torch.tensor([v], dtype=torch.float64) for v in (uniform, done)))
        assert 0.0 <= float(s) < float(t) <= 1.0


def test_progressive_draws_all_steps_of_its_grid_alike() -> None:
    t, s = build("progressive").times(VP, 4, torch.arange(100, dtype=torch.float64) / 100, torch.zeros(100))
    assert [(float(a), float(b)) for a, b in zip(t[::25], s[::25], strict=True)] == [
        (1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)
    ]  # fmt: skip
    assert t.unique(return_counts=True)[1].tolist() == [25, 25, 25, 25]


def test_consistency_begins_at_the_image_and_ends_at_near_neighbors() -> None:
    distiller = build("consistency", doublings=8)
    uniform = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    ratio = {}
    for done in (0.0, 0.5, 0.99):
        t, s = distiller.times(VP, 4, uniform, torch.full_like(uniform, done))
        r_t, r_s = (torch.expm1(VP.schedule.integral(time)).sqrt() for time in (t, s))
        ratio[done] = r_s / r_t
    assert (ratio[0.0][:500] == 0.0).all()
    n = 1.0 + 8.0 * torch.sigmoid(-0.5 * r_t)
    torch.testing.assert_close(ratio[0.99], 1.0 - n / 2.0**8, rtol=1e-6, atol=1e-6)
    assert (ratio[0.0] <= ratio[0.5]).all()
    assert (ratio[0.5] < ratio[0.99]).all()
    # ln(sigma/alpha) is normal with the mean and spread that were asked for
    assert r_t.log().median().item() == pytest.approx(-0.4, abs=0.01)


def test_the_consistency_sampler_ends_at_what_is_seen_and_noises_anew() -> None:
    noise = normal(5, 64, 1, 1, 1)
    seen = []

    class OneImage:
        diffusion, nfe_per_call = VP, 1

        def __call__(self, u, t, *, threshold):
            seen.append((t, u))
            return type("Prediction", (), {"x0": torch.full_like(u, 0.7)})

    sampler = SAMPLERS.build({"name": "consistency", "steps": 2}, IO)
    done = sampler.sample(OneImage(), normal(6, 64, 1, 1, 1), lambda i: noise)
    assert done.u.eq(0.7).all()
    assert done.nfe.eq(2).all()
    time, u = seen[1]
    torch.testing.assert_close(u, VP.perturb(torch.full_like(noise, 0.7), time, noise))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "progressive", "start": 64, "end": 5}, "end must be start halved one or more times"),
        ({"name": "progressive", "start": 4, "end": 4}, "end must be start halved one or more times"),
        ({"name": "consistency", "q": 1.0}, r"distiller\.q=1\.0: use more than 1"),
        ({"name": "consistency", "doublings": 0}, r"distiller\.doublings=0: use 1 or more"),
    ],
)
def test_settings_that_cannot_be(fields: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        DISTILLERS.build(fields, IO)


LAUNCHES = """
import json, pathlib, shutil, sys
from dvae.tools import launch
words = sys.argv[1:]
launch.command([*words, "run=teacher"])
own = ["teacher=teacher", "data.shards=teacher/shards", "stages=[distil,evaluate]"]
own += [f"train_distil.{name}" for name in ("steps=4", "batch=8", "log_every=2", "save_every=2", "keep=9", "warmup=1")]
progressive = [*own, "distiller=progressive", "distiller.start=4", "distiller.end=1"]
launch.command([*words, *progressive, "run=progressive"])
again = pathlib.Path("again")
shutil.copytree("progressive", again)
for name in ("bundle", "checkpoints/distil-1/step-00000004"):
    shutil.rmtree(again / name)
for name in ("distil-1", "denoiser"):
    (again / f"weights/{name}.safetensors").unlink()
records = json.loads((again / "stages.json").read_text())
(again / "stages.json").write_text(json.dumps({"distil-2": records["distil-2"]}))
launch.command([*words, *progressive, "run=again"])
launch.command([*words, *own, "run=consistency", "distiller=consistency", "sampler=consistency", "sampler.steps=2"])
"""
"""A teacher, its students, and one student that goes on in its second round: in one process, to be quick."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("distil")
    command = [sys.executable, "-c", LAUNCHES, *tiny, "denoiser.data_scale=2"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_rounds_are_stages_of_their_own(runs: Path) -> None:
    rows = [json.loads(line) for line in (runs / "progressive" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [
        ("distil-2", 2), ("distil-2", 4), ("distil-1", 2), ("distil-1", 4)
    ]  # fmt: skip
    records = json.loads((runs / "progressive" / "stages.json").read_text())
    assert list(records) == ["distil-2", "distil-1", "distil", "evaluate"]


@pytest.mark.slow
def test_a_student_is_a_bundle_with_its_teachers_encoder(runs: Path) -> None:
    teacher = load_file(runs / "teacher" / "bundle" / "model.safetensors")
    for name in ("progressive", "consistency"):
        student = load_file(runs / name / "bundle" / "model.safetensors")
        assert student.keys() == teacher.keys()
        same = {key for key, value in student.items() if torch.equal(value, teacher[key])}
        kept = {key for key in teacher if not key.startswith("denoiser.refiner")}
        assert kept <= same
        assert same < teacher.keys()
        made = pipeline.load(runs / name)
        with made.using(steps=1):
            images = made.generate(2, 0)[1]
        assert images.shape == (2, 3, 16, 16)
        assert made.nfe == 1


@pytest.mark.slow
def test_a_resumed_round_is_the_same(runs: Path) -> None:
    whole, again = (load_file(runs / name / "bundle" / "model.safetensors") for name in ("progressive", "again"))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def words_of(tiny: list[str], runs: Path, *more: str) -> list[str]:
    shared = ["denoiser.data_scale=2", f"teacher={runs}/teacher", f"data.shards={runs}/teacher/shards"]
    return [*tiny, *shared, "stages=[distil,evaluate]", "distiller=progressive", *more]


@pytest.mark.slow
def test_a_dry_run_tells_the_rounds(runs: Path, tiny: list[str]) -> None:
    said = dry_run(configuration.compose("train", words_of(tiny, runs, "train_distil.batch=8")))
    assert "distil: for 32 -> 16 -> 8 -> 4 steps, 100000 steps of 8 images each" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["refiner.width=64"], r"teacher=.* has refiner\.width=32, this run 64: it is another network"),
        (["teacher=nowhere"], "nowhere: no such run or bundle"),
        (["teacher="], "set teacher=RUN"),
        (["distiller=null"], "set distiller=consistency or progressive"),
        (["denoiser.prediction=eps"], "distil a teacher that predicts v or x0"),
        (["process=psld", "sampler=em", "denoiser.prediction=eps"], "needs a process with k = 1, this has k = 2"),
    ],
)
def test_what_does_not_go_together_is_refused(words: list[str], said: str, runs: Path, tiny: list[str]) -> None:
    with pytest.raises(UserError, match=said):
        validate.check(configuration.to_run_config(configuration.compose("train", words_of(tiny, runs, *words))))
