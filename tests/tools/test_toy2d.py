"""Points from end to end: a tiny toy2d run, its resuming, its bundle, and the gallery drawn of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests_support import environment

from dvae.config import compose, validate
from dvae.errors import UserError
from dvae.inference import pipeline
from dvae.models import components
from dvae.registry.samplers.base import SAMPLERS
from dvae.tools import gallery as gallery_tool
from dvae.tools import sample as sample_tool
from dvae.toy2d import gallery, points

TINY = [
    "recipe=toy2d", "source.densities=[moons,rings]", "refiner.width=16", "refiner.blocks=1", "sampler.steps=3",
    "train_refiner.steps=6", "train_refiner.batch=16", "train_refiner.warmup=2", "train_refiner.log_every=1",
    "train_refiner.save_every=2", "train_refiner.keep=9", "train_refiner.preview_every=3", "evaluate.n=40",
    "evaluate.seeds=[0,1]", "evaluate.every_steps=3",
]  # fmt: skip


LAUNCHES = """
import pathlib, shutil, sys
from dvae.tools import launch
words = sys.argv[1:]
for process in ("vp", "psld"):
    launch.command([*words, f"process={process}"])
again = pathlib.Path("runs/resumed")
shutil.copytree("runs/toy2d/vp", again)
for name in ("bundle", "weights", "checkpoints/refiner/step-00000006"):
    shutil.rmtree(again / name)
(again / "stages.json").unlink()
launch.command([*words, "process=vp", f"run={again}"])
"""
"""Two runs, and a third that goes on from step 4 of the first: in one process, since starting one takes longest."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where toy2d was trained for two processes."""
    folder = tmp_path_factory.mktemp("toy2d")
    command = [sys.executable, "-c", LAUNCHES, *TINY]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "toy2d"


def test_a_run_leaves_figures_and_pictures(finished: Path) -> None:
    for name in ("vp", "psld"):
        run = finished / name
        evaluation = json.loads((run / "summary.json").read_text())["evaluation"]
        assert evaluation["nfe"] == 3
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        classes = evaluation["points"]["classes"].values()
        distances = [figures["sliced_wasserstein"]["values"][0] for figures in classes]
        assert last["sliced_wasserstein"] == sum(distances) / len(distances)  # scored while training, at the last step
        classes = evaluation["points"]["classes"]
        assert list(classes) == ["moons", "rings"]
        assert all(figures["sliced_wasserstein"]["mean"] > figures["floor"]["mean"] > 0 for figures in classes.values())
        assert len(classes["moons"]["sliced_wasserstein"]["values"]) == 2
        for picture in ("points.png", "refiner-00000003.png", "refiner-00000006.png"):
            assert Image.open(run / "images" / picture).width > 300
        page = (run / "report.html").read_text()
        assert f"{classes['rings']['floor']['mean']:.4f}" in page
        assert "Generated points" in page


def test_a_bundle_draws_the_class_that_it_is_asked_for(finished: Path) -> None:
    run = pipeline.load(finished / "psld")
    assert list(run.models.trained_parts()) == ["denoiser"]
    assert run.config.classes == ["moons", "rings"]
    moons, rings = (points.sample_points(run, label, 30, 0) for label in (0, 1))
    assert moons.shape == (30, 2)
    assert moons.isfinite().all()
    assert not torch.equal(moons, rings)
    torch.testing.assert_close(points.sample_points(run, 1, 5, 0), rings[:5], rtol=1e-3, atol=1e-4)


def test_a_run_resumes_bit_for_bit(finished: Path) -> None:
    run = finished.parent / "resumed"
    again, before = (load_file(folder / "bundle" / "model.safetensors") for folder in (run, finished / "vp"))
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) for name in before)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 7))


def test_the_gallery_draws_every_sampler_at_its_evaluations(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "here" / "gallery.png"
    settings = gallery.GalleryConfig(
        runs=str(finished), out=str(out), density="rings", nfe=[3, 7], tolerances=[0.5, 0.05], n=20
    )
    figures = gallery.make_gallery(settings)
    assert figures == json.loads(out.with_suffix(".json").read_text())
    assert Image.open(out).height > 500
    cells = figures["cells"]
    assert [cell["process"] for cell in cells] == sorted((cell["process"] for cell in cells), reverse=True)
    shown = {process: {c["sampler"] for c in cells if c["process"] == process} for process in ("vp", "psld")}
    assert (
        shown["vp"]
        == {name for name in SAMPLERS.names() if SAMPLERS.get(name).needs_mean_denoiser}
        < set(SAMPLERS.names())
    )
    assert {"em", "sscs", "ode", "deis"} <= shown["psld"] < shown["vp"]
    for cell in cells:
        assert cell["distance"] > 0
        if cell["sampler"] == "ode":
            assert cell["fields"]["tolerance"] == [0.5, 0.05][cell["column"]]
        else:
            assert cell["nfe"] == [3, 7][cell["column"]], cell
    heun = [cell["fields"]["steps"] for cell in cells if cell["sampler"] == "heun"]
    assert heun == [2, 4]


def test_heun_takes_the_most_steps_that_a_column_allows(finished: Path) -> None:
    settings = gallery.GalleryConfig(runs=str(finished / "vp"), density="moons", nfe=[8], tolerances=[0.1])
    (run,) = gallery.load_runs(settings).values()
    assert gallery.sampler_config(run, "heun", 0, settings, 0)["steps"] == 4


def test_the_gallery_tool(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["density=moons", "samplers=[ddim,em]", "nfe=[2]", "tolerances=[0.1]", "n=10"]
    gallery_tool.command([f"runs={finished}", *words])
    assert "3 panels" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"gallery.png", "gallery.json"}
    with pytest.raises(UserError, match="n=many"):
        gallery_tool.command(["n=many"])
    with pytest.raises(UserError, match="did you mean 'density'"):
        gallery_tool.command(["densiti=moons"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"density": "moon"}, "did you mean 'moons'"),
        ({"samplers": ["eulr"]}, "unknown sampler 'eulr'"),
        ({"nfe": []}, "one or more columns"),
        ({"nfe": [4, 8]}, "for each column"),
        ({"out": "gallery.pdf"}, "PNG"),
        ({"n": 0}, "use 1 or more"),
        ({"runs": "nowhere"}, "recipe=toy2d"),
    ],
)
def test_words_that_cannot_be_drawn(finished: Path, words: dict, said: str) -> None:
    fields = {"runs": str(finished), "density": "moons", "nfe": [2], "tolerances": [0.1], "n": 5} | words
    with pytest.raises(UserError, match=said):
        gallery.make_gallery(gallery.GalleryConfig(**fields))


def test_a_sampler_for_one_component_alone(finished: Path) -> None:
    fields = {"runs": str(finished / "psld"), "density": "moons", "samplers": ["ddim"]}
    with pytest.raises(UserError, match=r"none integrates process=psld"):
        gallery.make_gallery(gallery.GalleryConfig(**fields))


def test_points_are_not_sampled_as_images(finished: Path) -> None:
    with pytest.raises(UserError, match=r"tools/gallery\.py"):
        sample_tool.command([f"run={finished / 'vp'}", "n=2"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stages=[shards,refiner]"], "needs shards"),
        (["classes=[a,b]"], "has the classes moons, rings"),
        (["image_size=4"], "image_size=1"),
    ],
)
def test_settings_that_cannot_be(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        validate.check(compose.to_run_config(compose.compose("train", [*TINY, *words])))


def test_without_labels_the_densities_are_one_mixture() -> None:
    words = ["denoiser.condition_label=false", "classes=[]", "process=cld"]
    settings = compose.to_run_config(compose.compose("train", [*TINY, *words]))
    assert points.label_groups(settings, points.open_source(settings)) == {"moons + rings": None}
    assert components.build_models_on_meta(settings).denoiser.shapes.outputs == 1


@pytest.mark.slow
@pytest.mark.parametrize("process", ["vp", "psld"])
def test_what_is_learned_is_near_the_truth_and_nearer_with_more_evaluations(process: str, tmp_path: Path) -> None:
    """Under three minutes on one idle core."""
    words = ["recipe=toy2d", f"process={process}", "source.densities=[moons,gaussians]", "train_refiner.steps=2000"]
    command = [sys.executable, "-c", "import sys; from dvae.tools import launch; launch.command(sys.argv[1:])"]
    done = subprocess.run(
        [*command, *words, "evaluate.seeds=[0]"], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    runs = tmp_path / "runs" / "toy2d"
    for name, figures in json.loads((runs / process / "summary.json").read_text())["evaluation"]["points"][
        "classes"
    ].items():
        assert figures["sliced_wasserstein"]["mean"] < 2.0 * figures["floor"]["mean"], name
    drawn = gallery.make_gallery(
        gallery.GalleryConfig(
            runs=str(runs), out=str(tmp_path / "gallery.png"), density="moons", nfe=[5, 49], tolerances=[0.1, 1e-3]
        )
    )
    few, many = ({c["sampler"]: c["distance"] for c in drawn["cells"] if c["column"] == column} for column in (0, 1))
    assert set(many) >= {"em", "sscs", "ode", "deis"}
    floor = drawn["floor"]["mean"]
    for sampler in many:
        # ode takes no fewer than 44 evaluations, which are enough for vp: where both are at the floor, chance decides
        assert many[sampler] < few[sampler] or (sampler == "ode" and few[sampler] < 1.5 * floor), sampler
        assert many[sampler] < 3.0 * floor, sampler
