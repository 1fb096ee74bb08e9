from __future__ import annotations

import functools
from pathlib import Path

import lightning_files
import pytest
import torch
from omegaconf import DictConfig
from public_psld import PublicNCSNpp

from dvae.diffusion.conditioning import Conditioning
from dvae.errors import UserError
from dvae.inference import pipeline
from dvae.models.importers import convert_checkpoint

SIZE = 16
WORDS = ["from=psld", "recipe=demo", f"image_size={SIZE}", "refiner=ncsnpp", "schedule=constant", "sampler=em"]
SHORT = ["sampler.steps=2", "process=psld"]
PLAIN = {"channels": 6, "outputs": 6, "width": 32, "multipliers": [1, 2], "blocks": 2, "attended": [8], "side": SIZE}
BEST = {"blocks": 1, "multipliers": [2, 2], "fourier": True, "fir": True, "progressive": True}


def network(seed: int, **more) -> PublicNCSNpp:
    return lightning_files.randomize(PublicNCSNpp(**PLAIN | more), seed)


def save(folder: Path, online: PublicNCSNpp, average: PublicNCSNpp) -> dict[str, torch.Tensor]:
    state = {f"score_fn.{name}": value for name, value in online.state_dict().items()}
    state |= {f"ema_score_fn.{name}": value for name, value in average.state_dict().items()}
    lightning_files.save(folder / "psld.ckpt", state)
    return state


@functools.cache
def composed(*words: str) -> DictConfig:
    return convert_checkpoint.compose(list(words))


def run(folder: Path, *words: str) -> list[str]:
    files = [f"ckpt={folder / 'psld.ckpt'}", f"out={folder / 'bundle'}"]
    return convert_checkpoint.convert(composed(*WORDS, *SHORT, *files, *words))


def refused(folder: Path, *words: str) -> str:
    with pytest.raises(UserError) as error:
        run(folder, *words)
    assert "\n" not in str(error.value)
    assert not (folder / "bundle").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, []),
        ({}, ["weights=online"]),
        (BEST, []),
        (BEST | {"fir": False}, []),
        ({"fir": True}, ["refiner.fir=true"]),  # no tensor shows it without the pyramid
        ({"multipliers": [1, 1, 3], "attended": [16, 4], "blocks": 1}, []),
        ({"channels": 3, "outputs": 3}, ["process=vp", "schedule=linear"]),
        ({"outputs": 3}, ["process=cld"]),
    ],
    ids=["plain", "online", "best", "pyramid", "fir", "attention", "vp", "cld"],
)
def test_networks_compute_what_the_public_code_does(tmp_path, settings, words):
    online, average = network(1, **settings), network(2, **settings)
    save(tmp_path, online, average)
    run(tmp_path, *words)
    denoiser = pipeline.load(tmp_path / "bundle").models.denoiser
    g = torch.Generator().manual_seed(3)
    u = torch.randn(3, (PLAIN | settings)["channels"], SIZE, SIZE, generator=g)
    t = torch.tensor([1e-4, 0.3, 1.0], dtype=torch.float64)
    nothing = Conditioning(torch.zeros(3, 3, SIZE, SIZE), torch.zeros(3, 0))
    with torch.no_grad():
        wanted = (online if "weights=online" in words else average)(u, t.float())
        torch.testing.assert_close(denoiser.network_output(u, t, nothing), wanted, atol=1e-5, rtol=1e-5)


def test_two_images_at_two_evaluations(tmp_path):
    save(tmp_path, network(1), network(2))
    run(tmp_path)
    loaded = pipeline.load(tmp_path / "bundle")
    _, refined = loaded.generate(2, seed=0)
    assert loaded.nfe == 2
    assert refined.shape == (2, 3, SIZE, SIZE)
    assert not torch.equal(refined[0], refined[1])


def test_what_tensors_tell_takes_the_place_of_the_recipe(tmp_path):
    save(tmp_path, network(1, **BEST), network(2, **BEST))
    lines = run(tmp_path)
    config = pipeline.load(tmp_path / "bundle").config
    refiner = config.refiner
    assert (refiner.width, refiner.multipliers, refiner.blocks) == (32, [2, 2], 1)
    assert (refiner.attention_resolutions, refiner.time.name) == ([8], "fourier")
    assert (refiner.fir, refiner.progressive_input, refiner.patch) == (True, True, 1)
    assert (config.encoder.name, config.prior.name) == ("none", "normal")
    assert not config.denoiser.condition_image
    assert any(line.startswith("  process=psld gamma=0.01 nu=4.01") for line in lines)
    assert not any(line.startswith("  refiner.fir") for line in lines)


def test_what_does_not_fit_is_refused(tmp_path):
    state = save(tmp_path, network(1), network(2))
    assert "takes 6 channels, process=vp on images of 3 gives 3" in refused(tmp_path, "process=vp", "schedule=linear")
    assert "the recipe has unet" in refused(tmp_path, "refiner=unet")
    path = tmp_path / "psld.ckpt"
    assert "PSLD has no VAE" in refused(tmp_path, f"vae={path}")

    def given(change: dict[str, torch.Tensor | None]) -> str:
        changed = {key: value for key, value in (state | change).items() if value is not None}
        lightning_files.save(path, changed)
        return refused(tmp_path)

    last = f"all_modules.{len(network(1).all_modules) - 1}"
    assert f"lack 'refiner.{last}.bias'" in given({f"ema_score_fn.{last}.bias": None})
    assert "all_modules.3 (" in given({"ema_score_fn.all_modules.3.Conv_0.weight": None})
    whole_module = {key: None for key in state if key.startswith("ema_score_fn.all_modules.9.")}
    assert "all_modules.9 (nothing)" in given(whole_module)
    assert "'refiner.all_modules.3.extra'" in given({"ema_score_fn.all_modules.3.extra": torch.ones(2)})
    assert "no part of NCSN++" in given({"ema_score_fn.sigmas": torch.ones(2)})
    assert "holds 'sde.beta'" in given({"sde.beta": torch.ones(2)})
    assert "use weights=online" in given({f"ema_score_fn.{last}.weight": 1e-8 * torch.ones(6, 32, 3, 3)})
    assert "holds a classifier" in given({"clf_fn.all_modules.0.weight": torch.ones(2)})
    of_bad_order = {"ema_score_fn.all_modules.0.weight": torch.ones(32, 6, 3, 3)}
    assert "not in the order" in given(of_bad_order)
