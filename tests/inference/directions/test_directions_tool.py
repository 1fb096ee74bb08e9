"""tools/directions.py on a run that was never trained: what it writes, and what it refuses. No figure is looked at."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dvae
from dvae.config import compose
from dvae.data.building import shard_build
from dvae.errors import UserError
from dvae.inference import directions
from dvae.models import bundle_export, components
from dvae.runs.folder import submit
from dvae.tools import directions as tool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """A run that was never trained, with its bundle, and the shards of its 160 faces."""
    place = tmp_path_factory.mktemp("directions")
    words = [f"run={place / 'run'}", f"data.shards={place / 'shards'}", "train_refiner.precision=fp32"]
    composed = compose.compose("train", [*tiny, *words, "denoiser.data_scale=1"])
    submit(composed)
    typed = compose.to_run_config(composed)
    shard_build.build(typed.source, 16, place / "shards", heldout_fraction=0.2, workers=1)
    made = components.build_models(typed)
    parts = {name: part.state_dict() for name, part in made.trained_parts().items()}
    bundle_export.export(place / "run" / "bundle", typed, parts)
    return place / "run"


def run(folder: Path, *words: str) -> None:
    tool.command([f"run={folder}", *words])


def test_find_list_and_score(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, "find=[labels,pca,jacobian]", "labels=[hair,skin_color]", "components=2", "jacobians=3")
    said = capsys.readouterr().out
    assert "skipped: head is the same in all images" in said
    names = directions.names(folder)
    assert names[-4:] == ["pca_1", "pca_2", "jacobian_1", "jacobian_2"]
    assert {name.partition(".")[0] for name in names[:-4]} == {"hair", "skin_color"}
    run(folder)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == names

    out = tmp_path / "scores.md"
    chosen = ["skin_color.8a5640", "pca_1"]
    run(
        folder, "score=true", f"directions=[{','.join(chosen)}]", "strengths=[1,2]", "validation=3", "n=4",
        "recognizer_steps=2", "recognizer_batch=8", "sampler.steps=1", f"out={out}",
    )  # fmt: skip
    assert capsys.readouterr().out.startswith(out.read_text().rstrip())
    figures = json.loads(out.with_suffix(".json").read_text())
    assert [one["name"] for one in figures["directions"]] == chosen
    assert figures["directions"][0]["target"] == "skin_color=#8a5640"
    assert figures["directions"][0]["strength"] in (1.0, 2.0)
    assert abs(figures["directions"][1]["strength"]) in (1.0, 2.0)
    assert set(figures["judge"]) == set(figures["directions"][0]["refined"]["changed"])
    assert (figures["n"], figures["validation"], figures["nfe"]) == (4, 3, 1)
    assert np.asarray(Image.open(out.with_suffix(".png"))).shape[2] == 4


def test_a_direction_moves_an_image_through_the_pipeline(folder: Path) -> None:
    run(folder, "find=[pca]", "components=1")
    pipeline = dvae.load(folder)
    z = torch.randn(2, 8)
    moved = directions.load(folder, "pca_1").move(z, 3.0)
    assert not torch.equal(pipeline.decode(moved), pipeline.decode(z))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["find=[labels]", "labels=[hairs]"], r"labels=hairs: .* did you mean 'hair'"),
        (["find=[pca]", "components=9"], r"components=9: pca finds 8 of them"),
        (["find=[pca]", "n_train=0"], r"n_train=0: use 1 or more"),
        (["score=true", "directions=[pca_7]"], r"directions=pca_7: .* did you mean 'pca_2'"),
        (["score=true", "n=1000"], r"validation=60 and n=1000 are more than the \d+ held-out images"),
        (["score=true", "strengths=[-1]"], r"strengths=\[-1.0\]: give one or more above 0"),
        (["score=true", "out=x.png"], r"out=x.png: use a name that ends in .md"),
        (["find=[labels]", "shards=nowhere"], r"nowhere"),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, words: list[str], says: str) -> None:
    if words[0] == "score=true":
        run(folder, "find=[pca]", "components=2")
    with pytest.raises(UserError, match=says):
        run(folder, *words)


def test_a_run_without_an_encoder_is_refused(tmp_path: Path, tiny: list[str]) -> None:
    words = ["encoder=none", "denoiser.condition_image=false", "denoiser.condition_latent=false", "prior=normal"]
    kept = [word for word in tiny if not word.startswith(("encoder.", "prior."))]
    composed = compose.compose("train", [*kept, *words, "stages=[shards,refiner]", "denoiser.center=none"])
    made = components.build_models(compose.to_run_config(composed))
    parts = {name: part.state_dict() for name, part in made.trained_parts().items()}
    bundle_export.export(tmp_path / "bundle", compose.to_run_config(composed), parts)
    with pytest.raises(UserError, match="has no encoder, so no latent to find directions of"):
        run(tmp_path / "bundle", "find=[pca]")
