"""tools/latents.py: what is written, priors fitted and put into a bundle that draws from them, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy.stats import multivariate_normal

import dvae
from dvae.config import compose
from dvae.data.shards.reader import Shards
from dvae.errors import UserError
from dvae.inference import prior_fitting
from dvae.models import bundle_export, components
from dvae.registry.encoders.base import Posterior
from dvae.runs.folder import submit
from dvae.tools import latents as tool
from dvae.tools import shards as shards_tool

MAP = [
    "encoder=kl_gan", "encoder.channels=[16,16]", "encoder.groups=4", "encoder.latent_channels=4",
    "encoder.discriminator_weight=0", "encoder.middle_attention=false", "prior=normal",
]  # fmt: skip
FLOW = ["prior=flow", "prior.couplings=2", "prior.width=8", "prior.steps=20", "prior.batch=16"]


def untrained(folder: Path, *words: str) -> Path:
    """A run folder with the bundle of a run that was never trained."""
    composed = compose.compose("train", [*words, f"run={folder}", "denoiser.data_scale=1"])
    made = components.build_models(compose.to_run_config(composed))
    parts = {name: part.state_dict() for name, part in made.trained_parts().items()}
    bundle_export.export(submit(composed).bundle, compose.to_run_config(composed), parts)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 faces of 16x16, a quarter held out."""
    out = tmp_path_factory.mktemp("latents") / "shards"
    words = ["source=avatars", "source.n=60", "size=16", "heldout_fraction=0.25", "workers=1", f"out={out}"]
    shards_tool.command(["build", *words])
    return out


@pytest.fixture(scope="module")
def run(shards: Path, tiny: list[str]) -> Path:
    return untrained(shards.parent / "vector", *tiny, f"data.shards={shards}")


@pytest.fixture(scope="module")
def latent_space(shards: Path) -> Path:
    small = ["image_size=16", "refiner.width=32", "refiner.multipliers=[1]", f"data.shards={shards}"]
    return untrained(shards.parent / "map", "recipe=ldm_avatars", *MAP, *small)


def test_what_is_written_is_the_posterior_and_the_labels(run: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "l.npz"
    tool.command([f"run={run}", f"out={out}", "split=heldout"])
    heldout = Shards(shards, "heldout")
    images = heldout.read(np.arange(len(heldout)))
    with torch.no_grad():
        posterior = dvae.load(run).models.encoder.encode(images / 127.5 - 1.0)
    with np.load(out, allow_pickle=False) as found:
        assert found["mean"].dtype == found["logvar"].dtype == np.float32
        np.testing.assert_allclose(found["mean"], posterior.mean, atol=1e-5)
        np.testing.assert_allclose(found["logvar"], posterior.logvar, atol=1e-5)
        about = json.loads(str(found["about"]))
        for index in range(len(heldout)):
            for name, value in heldout.info(index)["labels"].items():
                assert about["labels"][name][found[f"label.{name}"][index]] == str(value)
    assert about["weights"] == json.loads((run / "bundle" / "bundle.json").read_text())["sha256"]["model.safetensors"]
    assert list(tmp_path.iterdir()) == [out]


def test_safetensors_of_given_images_and_maps(run: Path, latent_space: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "own.npy", pixels)
    for folder, shape in ((run, (3, 8)), (latent_space, (3, 4, 8, 8))):
        out = tmp_path / f"{len(shape)}.safetensors"
        tool.command([f"run={folder}", f"out={out}", f"images={tmp_path / 'own.npy'}", "n=3"])
        with safe_open(out, "pt") as found:
            assert sorted(found.keys()) == ["logvar", "mean"]
            x = torch.from_numpy(pixels[:3]).permute(0, 3, 1, 2) / 127.5 - 1.0
            with torch.no_grad():
                wanted = dvae.load(folder).models.encoder.encode(x).mean
            assert found.get_tensor("mean").shape == shape
            torch.testing.assert_close(found.get_tensor("mean"), wanted, rtol=0, atol=1e-5)


def test_a_fitted_prior_is_drawn_from(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "flow"
    tool.command([f"run={run}", *FLOW, f"bundle={made}"])
    said = capsys.readouterr().out
    for words in ("flow ", "gmm (the run's)", "N(0, I)", "nats per dimension", str(made)):
        assert words in said
    before, after = dvae.load(run), dvae.load(made)
    assert after.config.prior.name == "flow"
    assert after.config.prior.width == 8
    for part in ("encoder", "denoiser"):
        state = getattr(after.models, part).state_dict()
        assert all(torch.equal(value, state[name]) for name, value in getattr(before.models, part).state_dict().items())
    prior = after.models.prior
    assert prior.center.abs().max() > 0
    drawn = after.sample_conditioning(4, seed=3).z
    normal = prior.to_noise(drawn)
    again = prior.sample(torch.rand(4), normal)
    torch.testing.assert_close(again, drawn, rtol=0, atol=1e-5)
    assert not torch.equal(after.generate(2, seed=3)[1], before.generate(2, seed=3)[1])


def test_a_preset_and_no_prior_at_all(run: Path, shards: Path, tmp_path: Path) -> None:
    tool.command([f"run={run}", "prior=gmm_demo", "prior.components=3", f"bundle={tmp_path / 'gmm'}"])
    assert dvae.load(tmp_path / "gmm").models.prior.means.shape == (3, 8)
    tool.command([f"run={tmp_path / 'gmm'}", "prior=normal", f"bundle={tmp_path / 'normal'}", f"shards={shards}"])
    plain = dvae.load(tmp_path / "normal")
    assert plain.config.prior.name == "normal"
    assert not plain.models.prior.state_dict()


def test_figures_are_the_mean_log_density_by_dimension(run: Path) -> None:
    made = dvae.load(run)
    mean = 2.0 * torch.randn(5000, 8, generator=torch.Generator().manual_seed(0))
    heldout = Posterior(mean, torch.full((5000, 8), -40.0))
    (found,) = prior_fitting.compare_priors([("N", made.models.prior)], heldout, seed=0)
    expected = multivariate_normal(np.zeros(8)).logpdf(heldout.mean) / 8  # an unfitted gmm
    assert found.means[0] == pytest.approx(expected.mean())
    assert found.means[1] == pytest.approx(expected.std(ddof=1) / np.sqrt(5000))
    assert found.draws[0] == pytest.approx(found.means[0], abs=1e-4)  # no width: a draw is the mean
    (wide,) = prior_fitting.compare_priors([("N", made.models.prior)], Posterior(mean, torch.zeros(5000, 8)), seed=0)
    assert wide.draws[0] == pytest.approx(found.means[0] - 0.5, abs=0.05)  # E z^2 is larger by 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"nothing would be written: add out=NAME\.npz"),
        (["out=x.csv"], r"out=x\.csv: use a name that ends with \.npz or \.safetensors"),
        (["out=x.npz", "split=test"], "split=test: known: heldout, train"),
        (["out=x.npz", "n=1000"], r"n=1000: there are \d+ images: use 1 to"),
        (["out=x.npz", "batch=0"], "batch=0: use 1 or more"),
        (["out=x.npz", "images=nowhere"], "images=nowhere"),
        (["out=x.npz", "shards=nowhere"], "no shards at nowhere"),
        (["bundle=b"], "go together: add prior=NAME"),
        (["prior=gmm"], "nothing would be written"),
        (["prior=gmm", "out=x.npz"], "go together: add bundle=FOLDER"),
        (["prior=gmn", "bundle=b"], "unknown prior 'gmn': did you mean 'gmm'"),
        (["prior=gmm", "prior.component=3", "bundle=b"], "did you mean 'components'"),
        (["prior=gmm", "prior.components=5000", "prior.max_samples=9000", "bundle=b"], "only .* latents to fit"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as refusal:
        tool.command([f"run={run}", *words])
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept_and_a_prior_needs_a_part(run: Path, latent_space: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.npz"
    out.write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        tool.command([f"run={run}", f"out={out}"])
    with pytest.raises(UserError, match="is there already"):
        tool.command([f"run={run}", "prior=gmm", f"bundle={tmp_path}"])
    with pytest.raises(UserError, match=r"prior=gmm: .* draws latents by diffusion .* without a prior"):
        tool.command([f"run={latent_space}", "prior=gmm", f"bundle={tmp_path / 'b'}"])
    assert out.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [out]
