"""Principal coordinates as guidance: counted in one pass, nothing changed at step 0, dropped per sample, and moved."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from closed_forms import diffusion, normal
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st
from tests_support import environment

import dvae
from dvae.diffusion.conditioning import Conditioning
from dvae.diffusion.denoiser import Denoiser, DenoiserConfig
from dvae.diffusion.guidance import Guidance, GuidedDenoiser
from dvae.errors import UserError
from dvae.layers.whitening import RunningCovariance, Whitening
from dvae.registry.core import Shapes
from dvae.registry.refiners.base import REFINERS

D = 6
UNET = {"name": "unet", "width": 64, "multipliers": [1], "blocks": 1, "attention_resolutions": []}


def latents(n: int = 500, seed: int = 0, rank: int = D) -> torch.Tensor:
    """Of another place and spread in every direction; all in a subspace of `rank` dimensions."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, rank, generator=draw) @ torch.randn(rank, D, generator=draw) + torch.arange(D)


def fitted(z: torch.Tensor, components: int) -> Whitening:
    moments = RunningCovariance(z.shape[1])
    moments.add(z)
    whitening = Whitening(components, z.shape[1])
    whitening.fit(moments)
    return whitening


@hypothesis_given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_parts_give_the_moments_of_the_whole(sizes: list[int]) -> None:
    z = 1e3 + latents(sum(sizes)).double()
    moments = RunningCovariance(D)
    for part in z.split(sizes):
        moments.add(part)
    torch.testing.assert_close(moments.mean, z.mean(0), rtol=1e-12, atol=0)
    if len(z) > 1:
        torch.testing.assert_close(moments.covariance, z.T.cov(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("components", [1, 3, D])
def test_coordinates_are_white(components: int) -> None:
    z = latents(2000)
    c = fitted(z, components)(z)
    assert c.shape == (2000, components)
    torch.testing.assert_close(c.T.cov().reshape(components, components), torch.eye(components), rtol=0, atol=0.02)
    assert c.abs().max() <= 4.0


def test_directions_without_variance_stay_bounded() -> None:
    """Fewer images than numbers, or images that are all alike: what is divided by has a floor."""
    for z in (latents(500, rank=2), latents(3), latents(1).repeat(50, 1) + 1e-9 * latents(50)):
        whitening = fitted(z, D)
        assert (whitening.deviation > 0).all() or z.var(0).max() < 1e-12
        assert whitening(z).isfinite().all()
        assert whitening(latents(10, seed=1)).abs().max() <= 4.0


def test_moving_one_coordinate_leaves_the_others() -> None:
    z = latents()
    whitening = fitted(z, D)
    some = z[:5]
    moved = whitening.with_coordinate(some, 1, torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]))
    before, after = whitening(some), whitening(moved)
    torch.testing.assert_close(after[:, 1], torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]), rtol=0, atol=1e-4)
    others = [i for i in range(D) if i != 1]
    torch.testing.assert_close(after[:, others], before[:, others], rtol=0, atol=1e-4)


def make(components: int = 0, **config: object) -> Denoiser:
    torch.manual_seed(0)
    shapes = Shapes(image_size=8, latent=(D,), condition_channels=3, condition_latent=True)
    refiner = REFINERS.build(UNET, shapes)
    for parameter in refiner.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    settings = DenoiserConfig(**({"condition_latent": True, "pca_components": components} | config))
    denoiser = Denoiser(refiner, diffusion("vp", "cosine"), settings, shapes).eval()
    if components:
        moments = RunningCovariance(D)
        moments.add(latents())
        denoiser.whitening.fit(moments)
    return denoiser


def inputs(n: int = 4) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    z = latents(n, seed=3)
    return (
        normal(5, n, 3, 8, 8).float(),
        torch.full((n,), 0.5, dtype=torch.float64),
        Conditioning(normal(6, n, 3, 8, 8).float(), z),
    )


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("components", [1, D])
@torch.no_grad()
def test_before_anything_is_learned_it_is_the_refiner_without(components: int, bf16: bool) -> None:
    u, t, conditioning = inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert torch.equal(
            make(components).network_output(u, t, conditioning), make().network_output(u, t, conditioning)
        )


def learned(components: int = 3) -> Denoiser:
    denoiser = make(components)
    torch.nn.init.normal_(denoiser.pca_projection, std=0.5)
    return denoiser


@torch.no_grad()
def test_dropped_per_sample_it_is_the_refiner_without() -> None:
    u, t, conditioning = inputs()
    keep = torch.tensor([True, False, True, False])
    dropped, kept = (learned().network_output(u, t, views) for views in (conditioning.drop_pca(keep), conditioning))
    without = make().network_output(u, t, conditioning)
    torch.testing.assert_close(dropped[keep], kept[keep], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dropped[~keep], without[~keep], rtol=1e-4, atol=1e-4)
    assert (kept - without).abs().amax((1, 2, 3)).min() > 1e-3


def test_training_drops_it_as_often_as_it_says() -> None:
    keep = make(3, pca_dropout=0.25).sample_noise(0, torch.arange(4000)).keep_pca
    assert keep is not None
    assert keep.double().mean().item() == pytest.approx(0.75, abs=0.03)


@torch.no_grad()
def test_guidance_goes_on_from_without_to_with() -> None:
    u, _, conditioning = inputs()
    denoiser = learned()
    eps = {w: GuidedDenoiser(denoiser, conditioning, Guidance(pca=w))(u, 0.5).eps for w in (0.0, 1.0, 2.5)}
    torch.testing.assert_close(eps[2.5], eps[0.0] + 2.5 * (eps[1.0] - eps[0.0]), rtol=1e-3, atol=1e-3)
    assert GuidedDenoiser(denoiser, conditioning, Guidance(pca=2.5)).nfe_per_call == 2
    assert (eps[1.0] - eps[0.0]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"pca_components": 7}, r"pca_components=7: z has 6 numbers, use 0 to 6"),
        ({"pca_components": -1}, r"pca_components=-1: z has 6 numbers"),
        ({"pca_components": 2, "condition_latent": False}, "set denoiser.condition_latent=true"),
        ({"pca_components": 2, "pca_dropout": 1.5}, r"pca_dropout=1\.5 is not a probability"),
    ],
)
def test_settings_that_cannot_be(config: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make(**{"components": config.pop("pca_components"), **config})


def test_guidance_needs_training_that_drops_it() -> None:
    for denoiser in (make(), make(3, pca_dropout=0.0)):
        with pytest.raises(UserError, match=r"pca_guidance=2\.0 needs a refiner trained with"):
            GuidedDenoiser(denoiser, inputs()[2], Guidance(pca=2.0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("pca")
    command = [sys.executable, "-c", "import sys; from dvae.tools import launch; launch.command(sys.argv[1:])"]
    words = [*tiny, "denoiser.pca_components=8", "stages=[shards,encoder,prior,refiner]", "run=run"]
    done = subprocess.run(
        [*command, *words], cwd=folder, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.slow
def test_a_run_learns_it_and_its_bundle_moves_along_it(run: Path) -> None:
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(loss == loss for loss in losses)
    pipeline = dvae.load(run)
    denoiser = pipeline.models.denoiser
    assert denoiser.pca_projection.any()
    assert denoiser.whitening.mean.any()
    strip = pipeline.edit([0, 1], 1, [-3.0, 0.0, 3.0])
    assert strip.shape == (2, 3, 3, 16, 16)
    assert not torch.equal(strip[:, 0], strip[:, 2])
    with pytest.raises(UserError, match="component=9: the refiner knows 8 principal components: use 1 to 8"):
        pipeline.edit([0], 9, 1.0)
