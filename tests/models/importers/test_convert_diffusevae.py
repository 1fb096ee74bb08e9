from __future__ import annotations

import functools
from pathlib import Path

import lightning_files
import pytest
import torch
from omegaconf import DictConfig
from public_diffusevae import PublicUNet, PublicVAE, ddpm_state

from dvae.errors import UserError
from dvae.inference import pipeline
from dvae.layers.norms import GroupNorm, default_groups
from dvae.models.importers import convert_checkpoint
from dvae.registry.refiners.base import NetworkCondition

CHANNELS = {16: 8, 8: 16, 4: 16, 1: 24}
STRINGS = {
    "enc_block_str": "16x1,16d2,16t8,8d2,8t4,4x2,4d4,4t1,1x1",
    "dec_block_str": "1x2,1u4,1t4,4x1,4u2,4t8,8x2,8u2,8t16,16x1",
    "enc_channel_str": "16:8,8:16,4:16,1:24",
}
WORDS = ["from=diffusevae", "recipe=demo", "image_size=16", "sampler.steps=2", "sampler.spacing=uniform"]
LEVELS = "encoder.resolutions=[16,8,4,1]"


@pytest.fixture(scope="module")
def vae() -> PublicVAE:
    network = PublicVAE(STRINGS["enc_block_str"], STRINGS["dec_block_str"], CHANNELS)
    return lightning_files.randomize(network, 1)


def unet(seed: int, **more) -> PublicUNet:
    settings = {"width": 64, "multipliers": [1, 2], "blocks": 2, "factors": [2], "heads": 4, "z_dim": 24} | more
    return lightning_files.randomize(PublicUNet(**settings), seed)


def save(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    return lightning_files.save(folder / "ddpm.ckpt", state)


@functools.cache
def composed(*words: str) -> DictConfig:
    return convert_checkpoint.compose(list(words))


def run(folder: Path, *words: str) -> list[str]:
    return convert_checkpoint.convert(
        composed(*WORDS, f"ckpt={folder / 'ddpm.ckpt'}", f"out={folder / 'bundle'}", *words)
    )


def imported(folder: Path, *words: str) -> pipeline.Pipeline:
    run(folder, *words)
    return pipeline.load(folder / "bundle")


def inputs(n: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """u, x_hat, z, and steps of DDPM."""
    g = torch.Generator().manual_seed(5)
    u, x_hat = torch.randn(n, 3, 16, 16, generator=g), torch.rand(n, 3, 16, 16, generator=g) * 2 - 1
    return u, x_hat, torch.randn(n, 24, generator=g), torch.tensor([0, 417, 999])[:n]


@pytest.mark.parametrize("weights", ["ema", "online"])
def test_networks_compute_what_the_public_code_does(tmp_path, vae, weights):
    online, average = unet(2), unet(3)
    save(tmp_path, ddpm_state(online, average, vae))
    loaded = imported(tmp_path, LEVELS, "refiner.heads=4", f"weights={weights}")
    denoiser, encoder = loaded.models.denoiser, loaded.models.encoder
    u, x_hat, z, steps = inputs()
    with torch.no_grad():
        wanted = (average if weights == "ema" else online)(u, steps, x_hat, z)
        torch.testing.assert_close(
            denoiser.refiner(u, steps.float(), NetworkCondition(x_hat, z)), wanted, atol=1e-5, rtol=1e-5
        )
        mean, logvar = vae.encode(0.5 * (x_hat + 1))
        posterior = encoder.encode(x_hat)
        torch.testing.assert_close(posterior.mean, mean.flatten(1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(posterior.logvar, logvar.flatten(1), atol=1e-5, rtol=1e-5)
        decoded = 2 * vae.decode(z[:, :, None, None]) - 1
        torch.testing.assert_close(encoder.decode(z), decoded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("width", "groups"), [(32, 32), (64, 0), (96, 0)])
def test_groups_are_those_of_the_public_code_at_any_width(tmp_path, vae, width, groups):
    network = unet(2, width=width, blocks=1, factors=[1, 2])
    save(tmp_path, ddpm_state(network, network, vae))
    lines = run(tmp_path, LEVELS, "refiner.heads=4")
    loaded = pipeline.load(tmp_path / "bundle")
    u, x_hat, z, steps = inputs()
    with torch.no_grad():
        ours = loaded.models.denoiser.refiner(u, steps.float(), NetworkCondition(x_hat, z))
        torch.testing.assert_close(ours, network(u, steps, x_hat, z), atol=1e-6, rtol=1e-6)
    assert loaded.config.refiner.groups == groups
    assert f"refiner.groups={groups} " in next(line for line in lines if line.startswith("known from"))


def test_a_network_of_width_32_needs_these_groups(tmp_path, vae):
    """With the number of groups that dvae takes for its own networks of this width the images would be others."""
    network = unet(2, width=32, blocks=1, factors=[1, 2])
    save(tmp_path, ddpm_state(network, network, vae))
    refiner = imported(tmp_path, LEVELS, "refiner.heads=4").models.denoiser.refiner
    of_width = {module.num_groups for module in refiner.modules() if isinstance(module, GroupNorm)}
    assert of_width == {32}
    for module in refiner.modules():
        if isinstance(module, GroupNorm):
            module.num_groups = default_groups(module.num_channels)
    u, x_hat, z, steps = inputs()
    with torch.no_grad():
        other = refiner(u, steps.float(), NetworkCondition(x_hat, z))
        assert (other - network(u, steps, x_hat, z)).abs().max() > 0.1


def test_the_whole_of_formulation_2_is_wired_as_in_the_public_code(tmp_path, vae):
    network = unet(2)
    save(tmp_path, ddpm_state(network, network, vae, formulation=2, steps=500))
    loaded = imported(tmp_path, LEVELS, "refiner.heads=4")
    u, x_hat, z, _ = inputs(1)
    with torch.no_grad():
        y = u - x_hat  # our coordinate: the public code's state less x_hat
        t = torch.tensor([0.5], dtype=torch.float64)  # index 249 of a table of 500
        ours = loaded.models.denoiser.network_output(y, t, pipeline.Conditioning(x_hat, z))
        # our time feature counts to 1000 in tables of any length; the public code feeds the index
        torch.testing.assert_close(ours, network(u, torch.tensor([2 * 249]), x_hat, z), atol=1e-5, rtol=1e-5)
        betas = torch.linspace(1e-4, 0.02, 500, dtype=torch.float64)
        abar = loaded.models.denoiser.diffusion.alpha(t) ** 2
        torch.testing.assert_close(abar, (1 - betas).cumprod(0)[249:250], rtol=1e-6, atol=0)


def test_two_images_at_two_evaluations(tmp_path, vae):
    save(tmp_path, ddpm_state(unet(2), unet(3), vae))
    loaded = imported(tmp_path, LEVELS, "refiner.heads=4")
    x_hat, refined = loaded.generate(2, seed=0)
    assert loaded.nfe == 2
    assert x_hat.shape == refined.shape == (2, 3, 16, 16)
    assert refined.dtype == torch.uint8
    assert not torch.equal(refined[0], refined[1])


def test_what_tensors_tell_takes_the_place_of_the_recipe(tmp_path, vae):
    network = unet(2, blocks=1, multipliers=[1, 1, 2], factors=[1, 4], heads=1)
    save(tmp_path, ddpm_state(network, network, vae, formulation=2))
    lines = run(tmp_path, LEVELS)
    config = pipeline.load(tmp_path / "bundle").config
    refiner, encoder, denoiser = config.refiner, config.encoder, config.denoiser
    assert (refiner.width, refiner.multipliers, refiner.blocks) == (64, [1, 1, 2], 1)
    assert (refiner.attention_resolutions, refiner.scale_shift_norm, refiner.patch) == ([16, 4], True, 1)
    assert (encoder.channels, encoder.latent_dim) == ([8, 16, 16, 24], 24)
    assert (encoder.encoder_blocks, encoder.decoder_blocks) == ([2, 1, 3, 1], [1, 2, 1, 2])
    assert (denoiser.center.name, denoiser.condition_latent, denoiser.prediction.name) == ("input", True, "eps")
    assert (config.prior.name, config.schedule.name) == ("normal", "ddpm_linear")
    assert (config.schedule.beta_start, config.schedule.beta_end, config.schedule.steps) == (1e-4, 0.02, 1000)
    changed = next(line for line in lines if line.startswith("changed"))
    assert "refiner.attention_resolutions [] -> [16,4]" in changed
    assert "denoiser.center residual -> input" in changed
    assert "prior gmm -> normal" in changed
    assert any(line.startswith("  refiner.heads=1 (if wrong") for line in lines)
    assert any(line.startswith("  encoder.resolutions=[16,8,4,1]") for line in lines)


def test_a_vae_of_its_own_brings_its_resolutions(tmp_path, vae):
    other = lightning_files.randomize(PublicVAE(STRINGS["enc_block_str"], STRINGS["dec_block_str"], CHANNELS), 9)
    save(tmp_path, ddpm_state(unet(2), unet(3), other))
    lightning_files.save(tmp_path / "vae.ckpt", vae.state_dict(), STRINGS)
    lines = run(tmp_path, f"vae={tmp_path / 'vae.ckpt'}")  # the recipe's resolutions are others
    loaded = pipeline.load(tmp_path / "bundle")
    assert loaded.config.encoder.resolutions == [16, 8, 4, 1]
    assert not any(line.startswith("  encoder.resolutions") for line in lines)
    torch.testing.assert_close(loaded.models.encoder.dec.last_conv.weight, vae.dec.last_conv.weight.detach())


def test_an_unconditional_network_has_no_encoder(tmp_path, vae):
    network = unet(2, z_dim=0, conditional=False, heads=1)
    save(tmp_path, ddpm_state(network, network, vae))
    loaded = imported(tmp_path)
    assert loaded.config.encoder.name == "none"
    u, _, _, steps = inputs()
    with torch.no_grad():
        ours = loaded.models.denoiser.refiner(u, steps.float(), NetworkCondition())
        torch.testing.assert_close(ours, network(u, steps, None, None), atol=1e-5, rtol=1e-5)
    assert loaded.generate(2, seed=0)[1].shape == (2, 3, 16, 16)


def test_half_precision_weights_become_single(tmp_path, vae):
    state = {n: v.half() if "decoder" in n else v for n, v in ddpm_state(unet(2), unet(3), vae).items()}
    save(tmp_path, state)
    weight = imported(tmp_path, LEVELS).models.denoiser.refiner.out[2].weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, state["target_network.decoder.out.2.weight"].float())


def refused(folder: Path, *words: str) -> str:
    with pytest.raises(UserError) as error:
        run(folder, *words)
    assert "\n" not in str(error.value)
    assert [item.name for item in folder.iterdir() if item.is_dir()] == []  # nothing is left half-written
    return str(error.value)


def test_tensors_that_do_not_fit_are_named(tmp_path, vae):
    whole = ddpm_state(unet(2), unet(3), vae)
    decoder = "target_network.decoder."

    def without(name: str) -> dict[str, torch.Tensor]:
        return {key: value for key, value in whole.items() if key != name}

    save(tmp_path, without(f"{decoder}output_blocks.1.0.in_layers.2.bias"))
    assert "lack 'refiner.output_blocks.1.0.in_layers.2.bias'" in refused(tmp_path, LEVELS)
    save(tmp_path, without(f"{decoder}out.2.weight"))
    assert "lacks 'out.2.weight'" in refused(tmp_path, LEVELS)
    save(tmp_path, without("vae.enc.block_mod.1.c1.bias"))
    assert "lack 'enc.block_mod.1.c1.bias'" in refused(tmp_path, LEVELS)
    save(tmp_path, without("online_network.betas"))
    assert "lacks 'online_network.betas'" in refused(tmp_path, LEVELS)
    save(tmp_path, whole | {f"{decoder}label_emb.weight": torch.ones(3, 128)})
    assert "hold 'refiner.label_emb.weight', which the config has no place for" in refused(tmp_path, LEVELS)
    save(tmp_path, whole | {"surprise.weight": torch.ones(3)})
    assert "holds 'surprise.weight'" in refused(tmp_path, LEVELS)
    save(tmp_path, whole | {f"{decoder}out.0.weight": torch.ones(7)})
    assert "'refiner.out.0.weight' is (7,) in the weights and (64,)" in refused(tmp_path, LEVELS)
    save(tmp_path, whole | {f"{decoder}out.0.weight": torch.full((64,), float("nan"))})
    assert "holds NaN or infinity" in refused(tmp_path, LEVELS)
    save(tmp_path, whole | {f"{decoder}out.2.weight": torch.zeros(3, 64, 3, 3)})
    assert "use weights=online" in refused(tmp_path, LEVELS)
    save(tmp_path, whole | {"online_network.betas": torch.linspace(0.01, 0.14, 1000).double() ** 2})
    assert "betas are not evenly spaced" in refused(tmp_path, LEVELS)


def test_wrong_layouts_are_refused(tmp_path, vae):
    lightning_files.save(tmp_path / "ddpm.ckpt", vae.state_dict(), STRINGS)
    assert "holds the VAE alone" in refused(tmp_path)
    lightning_files.save(tmp_path / "ddpm.ckpt", {"score_fn.all_modules.0.weight": torch.ones(3)})
    assert "has no target_network.decoder.*, but score_fn" in refused(tmp_path)
    save(tmp_path, {k: v for k, v in ddpm_state(unet(2), unet(3), vae).items() if "target" not in k})
    assert "weights=online reads the online network" in refused(tmp_path, LEVELS)
    save(tmp_path, ddpm_state(unet(2), unet(3), None))
    assert "holds no VAE" in refused(tmp_path)
    save(tmp_path, ddpm_state(unet(2), unet(3), vae))
    assert "the recipe has dit: choose another recipe" in refused(tmp_path, LEVELS, "refiner=dit")
    assert "encoder.resolutions" in refused(tmp_path, "encoder.resolutions=[16,1]")
    lightning_files.save(tmp_path / "vae.ckpt", vae.state_dict(), STRINGS | {"dec_block_str": "1u16,16x6"})
    assert "orders layers as conv_vae cannot" in refused(tmp_path, f"vae={tmp_path / 'vae.ckpt'}")
    lightning_files.save(tmp_path / "vae.ckpt", vae.state_dict(), STRINGS)
    other = ["image_size=32", f"vae={tmp_path / 'vae.ckpt'}"]
    assert "a VAE of 16 px, but the recipe has image_size=32" in refused(tmp_path, *other)
    unconditional = unet(2, z_dim=0, conditional=False)
    save(tmp_path, ddpm_state(unconditional, unconditional, vae))
    assert "is unconditional: leave vae= out" in refused(tmp_path, f"vae={tmp_path / 'vae.ckpt'}")
