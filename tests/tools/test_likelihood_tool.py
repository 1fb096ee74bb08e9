"""tools/likelihood.py: figures in closed form, going on after a kill, the bound of the whole model, refusals."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dvae
from dvae.config import compose
from dvae.data.images import to_float
from dvae.errors import UserError, fold
from dvae.inference import image_likelihood
from dvae.inference.generation.chunks import ChunkStore
from dvae.inference.image_likelihood import LikelihoodConfig
from dvae.models import bundle_export, components
from dvae.registry.encoders.base import Posterior
from dvae.tools import likelihood as tool

PLAIN = ["denoiser.data_scale=1", "denoiser.center=none", "train_refiner.precision=fp32"]


def untrained(folder: Path, *words: str) -> Path:
    """A bundle whose refiner puts out 0: as v that says that the state is N(0, I)."""
    composed = compose.compose("train", list(words))
    made = components.build_models(compose.to_run_config(composed))
    bundle_export.export(
        folder,
        compose.to_run_config(composed),
        {name: part.state_dict() for name, part in made.trained_parts().items()},
    )
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    return untrained(tmp_path_factory.mktemp("likelihood") / "bundle", *tiny, *PLAIN)


@pytest.fixture(scope="module")
def images(run: Path) -> Path:
    """Seven images of noise, each around its own gray."""
    draw = np.random.default_rng(0)
    levels = np.linspace(20, 230, 7)[:, None, None, None] + draw.normal(0, 8, (7, 16, 16, 3))
    path = run.parent / "images.npy"
    np.save(path, levels.clip(0, 255).astype(np.uint8))
    return path


def asked(run: Path, images: Path, out: Path, **words: object) -> LikelihoodConfig:
    given = {"run": str(run), "images": str(images), "out": str(out), "n": 7, "tolerance": 1e-3, **words}
    return LikelihoodConfig(**given)  # type: ignore[arg-type]


def test_figures_in_closed_form(run: Path, images: Path, tmp_path: Path) -> None:
    done = image_likelihood.score(asked(run, images, tmp_path / "l.json", batch=3))
    record = json.loads((tmp_path / "l.json").read_text())
    x = to_float(torch.from_numpy(np.load(images)).permute(0, 3, 1, 2))
    nats = 0.5 * x.double().square().flatten(1).mean(1) + 0.5 * math.log(2 * math.pi)
    bits = np.array(record["per_image"]["bits_per_dim"])
    np.testing.assert_allclose(bits, nats / math.log(2) + math.log2(127.5), atol=0.02)
    assert np.ptp(bits) > 0.3
    with torch.no_grad():
        kl = dvae.load(run).models.encoder.encode(x).kl()
    np.testing.assert_allclose(record["per_image"]["kl_nats"], kl, rtol=1e-4)
    np.testing.assert_allclose(record["per_image"]["kl_bits_per_dim"], kl / (768 * math.log(2)), rtol=1e-4)
    mean, error = done.figures["bits_per_dim"]
    assert mean == pytest.approx(bits.mean())
    assert error == pytest.approx(bits.std(ddof=1) / math.sqrt(7))
    assert done.nfe == pytest.approx(np.mean(record["per_image"]["nfe"]))
    assert done.scored == 7
    assert record["request"]["weights"] == json.loads((run / "bundle.json").read_text())["sha256"]["model.safetensors"]
    assert not list(tmp_path.glob(".*"))


def test_a_draw_of_z_costs_the_kl_on_average(run: Path, images: Path, tmp_path: Path) -> None:
    """Where the prior is N(0, I), as a gmm is that was not fitted: log q(z | x) - log p(z) over 16 draws of one x."""
    words = asked(run, images, tmp_path / "l.json", z=image_likelihood.LatentMode.draw, tolerance=0.05, batch=16)
    image = torch.from_numpy(np.load(images)[3]).permute(2, 0, 1).expand(16, -1, -1, -1)
    found = image_likelihood.score_chunk(dvae.load(run), words, image, [-1] * 16, range(16))
    rates = found["total_bits_per_dim"] - found["bits_per_dim"]
    assert rates.std() > 0
    assert abs(rates.mean() - found["kl_bits_per_dim"][0]) < 4 * rates.std(ddof=1) / 4


def test_the_posteriors_density() -> None:
    """log q at its mean is -(D log 2 pi + sum of logvar) / 2, and 1/2 less for a coordinate one deviation off."""
    posterior = Posterior(torch.tensor([[1.0, -2.0]]), torch.tensor([[0.4, -1.0]]))
    top = -0.5 * (2 * math.log(2 * math.pi) - 0.6)
    assert image_likelihood.log_posterior(posterior, posterior.mean).item() == pytest.approx(top, abs=1e-6)
    off = posterior.sample(torch.tensor([[1.0, 0.0]]))
    assert image_likelihood.log_posterior(posterior, off).item() == pytest.approx(top - 0.5, abs=1e-6)


class Killed(Exception):
    pass


def test_ended_and_gone_on_with(run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out = asked(run, images, tmp_path / "whole.json", batch=2), tmp_path / "l.json"
    image_likelihood.score(whole)
    real, calls = image_likelihood.score_chunk, []

    def dying(*words: object) -> dict[str, np.ndarray]:
        if len(calls) == 2:
            raise Killed
        calls.append(words)
        return real(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(image_likelihood, "score_chunk", dying)
    with pytest.raises(Killed):
        image_likelihood.score(asked(run, images, out, batch=2))
    monkeypatch.undo()
    assert not out.exists()
    with pytest.raises(UserError, match="unfinished, with seed=0, this asks for 1"):
        image_likelihood.score(asked(run, images, out, batch=2, seed=1))
    assert image_likelihood.score(asked(run, images, out, batch=2)).scored == 3
    assert not ChunkStore.folder_of(out).exists()
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert image_likelihood.score(asked(run, images, out, batch=2)).scored == 0
    with pytest.raises(UserError, match=r"is there already, made with n=7, this asks for 6"):
        image_likelihood.score(asked(run, images, out, batch=2, n=6))


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a request that is a number": (lambda _: {"request": 3}, "request: Input should be "),
    "the request alone": (lambda it: {"request": it["request"]}, "means: is missing"),
    "no nfe": (lambda it: {name: it[name] for name in it if name != "nfe"}, "nfe: is missing"),
    "nfe as text": (lambda it: it | {"nfe": "3"}, "nfe: Input should be a valid number"),
    "a mean as a number": (lambda it: it | {"means": {"bits_per_dim": 1.0}}, "means.bits_per_dim: Input should be "),
    "a mean without its error": (lambda it: it | {"means": {"a": {"mean": 1.0}}}, "standard_error: is missing"),
    "a figure more": (
        lambda it: it | {"means": it["means"] | {"a": it["means"]["kl_nats"]}},
        "other figures than bits",
    ),
    "a figure less": (lambda it: it | {"means": {}}, "with other figures than bits_per_dim, nfe, kl_nats"),
    "a list": (lambda _: [], "is not a result of this command (Input should be"),
}


def test_a_record_that_is_damaged_or_anothers_is_one_line(run: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "l.json"
    words = asked(run, images, out, n=1, tolerance=0.1)
    first = image_likelihood.score(words)
    record = json.loads(out.read_text())
    assert record["means"]["kl_nats"]["standard_error"] is None
    for name, (damage, says) in DAMAGES.items():
        out.write_text(json.dumps(damage(record)))
        with pytest.raises(UserError, match=re.escape(says)) as caught:
            image_likelihood.score(words)
        assert fold(caught.value).startswith(f"out={out} is there already, "), name
    out.write_text(json.dumps(record))
    again = image_likelihood.score(words)
    assert again.scored == 0
    np.testing.assert_equal(again.figures, first.figures)  # NaN for the error of one image


def test_the_command_says_what_it_found(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"images={images}", "n=1", "z=draw", "tolerance=0.01"]
    tool.command([f"run={run}", f"out={tmp_path / 'l.json'}", *words])
    said = capsys.readouterr().out
    for phrase in ("bits/dim of the refiner, given x_hat", "nats", "whole model, at most", "gradients each, 1 scored"):
        assert phrase in said


def test_without_an_encoder_there_is_no_kl(images: Path, tiny: list[str], tmp_path: Path) -> None:
    words = [*(word for word in tiny if not word.startswith(("encoder.", "prior."))), *PLAIN, "encoder=none"]
    words += ["prior=normal", "denoiser.condition_image=false", "denoiser.condition_latent=false"]
    folder = untrained(tmp_path / "bundle", *words)
    done = image_likelihood.score(asked(folder, images, tmp_path / "l.json", n=2))
    assert list(done.figures) == ["bits_per_dim"]
    with pytest.raises(UserError, match=r"z=draw: .* has no encoder"):
        image_likelihood.score(asked(folder, images, tmp_path / "d.json", z=image_likelihood.LatentMode.draw))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["n=0"], "n=0: use 1 or more"),
        (["n=8"], r"n=8: images=.* holds 7: use n=7 or less"),
        (["batch=0"], "batch=0: use 1 or more"),
        (["tolerance=0"], "tolerance=0: must be above 0"),
        (["out=x.txt"], r"out=x\.txt: use a name that ends with \.json"),
        (["z=middle"], "z=middle: Invalid value 'middle', expected one of"),
        (["label=cat"], "label=cat: this run has no classes"),
        (["images=heldout"], "with shards=FOLDER"),
        (["images=nowhere"], "images=nowhere"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as refusal:
        tool.command([f"run={run}", f"images={images}", "n=2", *words])
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipe=ldm_avatars", "image_size=16", "refiner.width=32", "refiner.multipliers=[1]",
          "encoder.channels=[16,16]", "encoder.groups=4", "encoder.latent_channels=4",
          "encoder.discriminator_weight=0"], "likelihood: not defined for denoiser.space=latent"),
        (["tiny", "schedule=flow"], "schedule=flow has no finite end at t = 1"),
    ],
)  # fmt: skip
def test_runs_without_such_a_figure(
    words: list[str], message: str, images: Path, tiny: list[str], tmp_path: Path
) -> None:
    own = [*tiny, *PLAIN, *words[1:]] if words[0] == "tiny" else [*words, "denoiser.data_scale=1"]
    folder = untrained(tmp_path / "bundle", *own)
    with pytest.raises(UserError, match=message):
        image_likelihood.score(asked(folder, images, tmp_path / "l.json"))
