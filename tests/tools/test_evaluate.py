"""tools/evaluate.py on a run that was never trained: figures, protocol, what is kept, studies, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import dvae
from dvae.config import compose
from dvae.data.building import shard_build
from dvae.errors import MachineError, UserError
from dvae.evaluation import features, metrics
from dvae.evaluation.features import FeatureMethod
from dvae.evaluation.image_sets import ImageArray, open_image_set
from dvae.evaluation.memorization import NearestImages, distance_summary, nearest
from dvae.evaluation.metrics import Extractor, Features
from dvae.models import bundle_export, components
from dvae.runs.folder import submit
from dvae.tools import evaluate

N = 20
SMALL = ["n=20", "kid_subset_size=10", "kid_subsets=5", "sampler.steps=2"]


def pixels(_: Extractor, images: torch.Tensor) -> Features:
    """Stands in for the network, whose features other tests check: 12 means of pixels, so that FID takes no time."""
    return Features(torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(metrics, "extract", pixels)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """A run folder whose shards lie where it says."""
    folder = tmp_path_factory.mktemp("evaluated")
    words = [
        *tiny,
        "denoiser.data_scale=1",
        "train_refiner.precision=fp32",
        f"data.shards={folder}/shards",
        f"run={folder}/run",
    ]
    composed = compose.compose("train", words)
    settings = compose.to_run_config(composed)
    made = components.build_models(settings)
    with torch.no_grad():
        made.denoiser.refiner.out[2].weight.normal_(std=0.02)  # it starts at zero
    parts = {name: part.state_dict() for name, part in made.trained_parts().items()}
    bundle_export.export(submit(composed).bundle, settings, parts)
    shard_build.build(settings.source, out=folder / "shards", size=16, heldout_fraction=0.2, channels=3, workers=1)
    return folder / "run"


def figures(*words: str, out: str = "evaluation.json") -> dict[str, object]:
    evaluate.command([*words, f"out={out}"])
    return json.loads(Path(out).read_text())  # type: ignore[no-any-return]


def test_figures_of_a_run(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = figures(f"run={run}", *SMALL, "seeds=[0,3]", "vae=true", "memorization=3")
    said = capsys.readouterr()
    assert "IS is left out" in said.err
    assert "| refined" in said.out
    shards = open_image_set("reference", str(run.parent / "shards"))
    real = pixels(None, shards.read(0, len(shards))).pooled  # type: ignore[arg-type]
    pipeline = dvae.load(run)
    pipeline.use_sampler(steps=2)
    for name, which in (("vae", 0), ("refined", 1)):
        sets = [pipeline.generate(N, seed)[which] for seed in (0, 3)]
        drawn = [pixels(None, images).pooled for images in sets if images is not None]  # type: ignore[arg-type]
        assert found["sets"][name]["FID-lite0"]["per_seed"] == [metrics.fid(part, real) for part in drawn]
        assert found["sets"][name]["KID-lite0"]["per_seed"] == [metrics.kid(part, real, 10, 5)[0] for part in drawn]
        both = [metrics.prc(part, real, 3) for part in drawn]
        assert found["sets"][name]["recall-lite0"]["per_seed"] == [recall for _, recall in both]
    protocol = found["protocol"]
    assert (protocol["nfe"], protocol["n"], protocol["seeds"], protocol["sampler"]["steps"]) == (2, N, [0, 3], 2)
    assert (protocol["isc_splits"], protocol["prc_neighborhood"], protocol["n_reference"]) == (None, 3, len(shards))
    assert set(found["floor"]) == {"heldout", "reference halves"}
    assert len(found["memorization"]["nearest"]) == 3
    assert Path("evaluation.memorization.png").stat().st_size > 0

    def never(*_: object) -> None:
        raise AssertionError("is there already")

    monkeypatch.setattr(metrics, "extract", never)
    again = figures(f"run={run}", *SMALL, "seeds=[0,3]", "vae=true", out="again.json")
    assert again["sets"] == found["sets"]

    damaged = next(Path("evaluation-cache").glob("result-*.json"))
    damaged.write_text("{")
    with pytest.raises(MachineError, match=rf"{damaged.name}: damaged"):
        figures(f"run={run}", *SMALL, "seeds=[0,3]", "vae=true", out="again.json")
    damaged.unlink()
    for kept in Path("evaluation-cache").glob("features-*"):
        kept.write_bytes(b"nothing")
    with pytest.raises(MachineError, match=r"features-.*: damaged .*; delete it, it will be made again"):
        figures(f"run={run}", *SMALL, "seeds=[0,3]", "vae=true", out="again.json")


def test_results_are_compared_only_under_one_protocol(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures(f"run={run}", *SMALL, out="a.json")
    figures(f"run={run}", *SMALL, "sampler.eta=1", out="b.json")
    figures(f"run={run}", *SMALL, "seeds=[1]", out="c.json")
    capsys.readouterr()
    evaluate.command(["compare=[a.json,b.json]"])
    table = capsys.readouterr().out
    assert table.count("| refined") == 2
    assert "FID-lite0" in table
    with pytest.raises(UserError, match=r"a\.json and c\.json: .*seeds is \[0\] here and \[1\] there"):
        evaluate.command(["compare=[a.json,c.json]"])
    Path("d.json").write_text("{}")
    with pytest.raises(UserError, match=r"d\.json holds no result with a protocol"):
        evaluate.command(["compare=[a.json,d.json]"])


@pytest.mark.slow
def test_studies(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"run={run}", "n=20", "kid_subset_size=10", "kid_subsets=5", "metrics=[kid]"]
    swept = figures(*words, "sweep=nfe", "samplers=[ddim,heun]", "steps=[1,3]", out="sweep.json")
    made = [(p["protocol"]["sampler"]["name"], p["protocol"]["nfe"]) for p in swept["points"]]
    assert made == [("ddim", 1), ("ddim", 3), ("heun", 1), ("heun", 5)]
    assert Path("sweep.md").read_text().count("| refined") == 4
    assert Path("sweep.png").stat().st_size > 0
    noisy = figures(*words, "sampler.steps=3", "noise=[0,0.5]", out="noise.json")
    kids = [p["sets"]["refined"]["KID-lite0"]["mean"] for p in noisy["points"]]
    assert kids[0] == swept["points"][1]["sets"]["refined"]["KID-lite0"]["mean"]  # no noise: the samples as they are
    assert kids[1] != kids[0]
    monkeypatch.setattr(metrics, "extract", None)  # every point is kept
    assert figures(*words, "sweep=nfe", "samplers=[ddim,heun]", "steps=[1,3]", out="again.json") == swept


@pytest.mark.slow
def test_two_processes_compute_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the true network
    images = np.random.default_rng(0).integers(0, 256, (11, 16, 16, 3), dtype=np.uint8)
    path = Path("x.npy").resolve()
    np.save(path, images)
    one, two = (
        features.compute_features(
            ImageArray(str(path)), FeatureMethod.for_extractor(metrics.lite0(), 4, processes), lambda _: None
        )
        for processes in (1, 2)
    )
    assert torch.equal(one.pooled, two.pooled)
    path.unlink()


def test_nearest_images() -> None:
    x = torch.tensor([[0.0, 0.0], [10.0, 10.0]])
    found = nearest(x, [torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0, 10.0], [0.0, 2.0]])])
    assert found.index.tolist() == [2, 1]
    assert found.distance.tolist() == pytest.approx([2**0.5, 0.0])
    heldout = NearestImages(torch.arange(1, 101).double(), torch.zeros(100, dtype=torch.int64))
    copies = NearestImages(torch.tensor([0.0, 0.0, 50.0, 60.0]).double(), torch.zeros(4, dtype=torch.int64))
    assert distance_summary(copies, heldout)["share_of_samples_near"] == 0.5
    assert distance_summary(heldout, heldout)["share_of_samples_near"] == pytest.approx(0.01)


def test_mistakes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(message: str, *words: str) -> None:
        with pytest.raises(UserError, match=message):
            evaluate.command(list(words))

    np.save("a.npy", np.zeros((5, 8, 8, 3), dtype=np.uint8))
    np.save("b.npy", np.zeros((9, 8, 8, 3), dtype=np.uint8))
    np.save("wide.npy", np.zeros((9, 8, 9, 3), dtype=np.uint8))
    np.save("one.npy", np.zeros((1, 8, 8, 3), dtype=np.uint8))
    files = ["images=a.npy", "reference=b.npy"]
    refused("name what is scored: run=FOLDER, or images=FOLDER reference=FOLDER", "n=5")
    refused("name the real images too", "images=a.npy")
    refused("kid_subset_size=1000 is more than the 9 images of the reference: use 9 or less", *files)
    refused("kid_subset_size=6 is more than the 5 images of images=a.npy: use 5 or less", *files, "kid_subset_size=6")
    refused("prc_neighborhood=5 needs more images than that, images=a.npy has 5: use 4 or less",
            *files, "metrics=[prc]", "prc_neighborhood=5")  # fmt: skip
    refused("FID needs two images or more, images=one.npy has 1", "images=one.npy", files[1], "metrics=[fid]")
    refused(r"b\.npy has images of 8x8|a\.npy has images of 8x8, wide\.npy of 8x9",
            files[0], "reference=wide.npy", "metrics=[fid]")  # fmt: skip
    refused(r"metrics=\[isc\] needs the standard Inception", *files, "metrics=[isc]")
    refused("draws from a run", *files, "memorization=4")
    refused("are two studies", f"run={run}", "sweep=nfe", "noise=[0.1]")
    refused("sweep=kid: use nfe", f"run={run}", "sweep=kid")
    refused("inception=w.pth: cannot be read", *files, "inception=w.pth")
    refused("kid_subset_size=50 is more than the 20 images of a set", f"run={run}", *SMALL, "kid_subset_size=50")
    refused("memorization= compares with held-out images", f"run={run}", "reference=b.npy", "memorization=2",
            "metrics=[fid]")  # fmt: skip
    capsys.readouterr()
    with pytest.raises(SystemExit):
        evaluate.command(["--help"])
    assert "compare=[a.json,b.json]" in capsys.readouterr().out
