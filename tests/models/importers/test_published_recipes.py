"""A checkpoint of the published size fits its recipe, with nothing changed but what is meant to be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from dvae.config import compose as configuration
from dvae.models import components
from dvae.models.importers import convert_checkpoint
from dvae.models.importers.checkpoint_file import CheckpointTensor
from dvae.models.importers.unpickle import TensorRef, TensorStorage


class Shapeless:
    """A checkpoint with names and shapes, and no numbers; settings of a VAE are not kept in it."""

    held: dict[str, CheckpointTensor]

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Shapeless:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def settings(self) -> dict[str, str]:
        return {}

    def state(self) -> dict[str, CheckpointTensor]:
        return self.held


def hold(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, CheckpointTensor]:
    held = {}
    for name, value in state.items():
        ref = TensorRef(TensorStorage(torch.float32, "0", value.numel()), 0, tuple(value.shape), value.stride())
        held[prefix + name] = CheckpointTensor(None, prefix + name, ref)
    return held


def no_numbers(tensor: CheckpointTensor) -> torch.Tensor:
    return torch.linspace(1e-4, 0.02, 1000) if tensor.name.endswith("betas") else torch.ones(tensor.shape)


@pytest.mark.parametrize(
    ("recipe", "layout", "changed"),
    [
        ("cifar10", "diffusevae", "prior gmm -> normal"),
        ("celebahq256", "diffusevae", "prior gmm -> normal"),
        ("psld_cifar10", "psld", "nothing"),
        ("cld_cifar10", "psld", "refiner.time_scale 1000.0 -> 1.0"),
    ],
)
def test_fits(recipe, layout, changed, tmp_path, monkeypatch):
    words = [f"from={layout}", f"recipe={recipe}", "ckpt=a.ckpt", f"out={tmp_path / 'b'}", "dry_run=true"]
    config = convert_checkpoint.compose(words)
    made = components.build_models_on_meta(
        configuration.to_run_config(OmegaConf.create(convert_checkpoint._plain(config)))
    )
    refiner = made.denoiser.refiner.state_dict()
    held = hold("ema_score_fn.", refiner)
    if layout == "diffusevae":
        held = hold("target_network.decoder.", refiner) | hold("vae.", made.encoder.state_dict())
        form2 = {"post_coeff_3": torch.ones(1000)} if made.denoiser.config.center.name == "input" else {}
        held |= hold("online_network.", {"betas": torch.ones(1000), **form2})
    monkeypatch.setattr(convert_checkpoint, "Checkpoint", Shapeless)
    monkeypatch.setattr(Shapeless, "held", held, raising=False)
    monkeypatch.setattr(CheckpointTensor, "load", no_numbers)
    lines = convert_checkpoint.convert(config)
    assert f"changed in recipe={recipe} for it: {changed}" in lines
