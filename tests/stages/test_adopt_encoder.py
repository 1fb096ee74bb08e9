"""Weights that were trained elsewhere become those of the run, without a step of training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests_support import dry_run

from dvae.config import compose as configuration
from dvae.config.schema import RunConfig
from dvae.config.validate import check
from dvae.errors import UserError
from dvae.models import bundle_export
from dvae.models.components import build_models
from dvae.registry.encoders.diffusers_kl import CONFIG, WEIGHTS
from dvae.runs.folder import Run, submit
from dvae.stages.encoder import EncoderStage
from dvae.stages.run_models import load_models


@pytest.fixture
def submitted(tmp_path: Path) -> tuple[Run, RunConfig]:
    """A run on a folder with random weights of another seed than the run's."""
    folder = tmp_path / "given"
    words = [
        "recipe=demo", "image_size=8", f"run={tmp_path / 'run'}", "encoder=diffusers_kl", f"encoder.folder={folder}",
        "encoder.block_out_channels=[8]", "encoder.norm_num_groups=4", "refiner.width=32", "refiner.multipliers=[1]",
        "refiner.attention_resolutions=[]", "prior.components=1", "evaluate.metrics=false",
    ]  # fmt: skip
    config = configuration.compose("train", words)
    other = configuration.to_run_config(config)
    other.seed = 5
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps({"block_out_channels": [8], "norm_num_groups": 4}), encoding="utf-8")
    save_file(build_models(other).encoder.autoencoder.state_dict(), folder / WEIGHTS)
    return submit(config), configuration.to_run_config(config)


def test_run_and_bundle_hold_the_given_weights(submitted: tuple[Run, RunConfig]) -> None:
    run, config = submitted
    given = build_models(config).encoder.pretrained()
    assert given is not None
    wanted = {name: value.clone() for name, value in given.items()}
    assert not torch.equal(build_models(config).encoder.state_dict()["autoencoder.encoder.conv_in.weight"],
                           wanted["autoencoder.encoder.conv_in.weight"])  # fmt: skip
    EncoderStage(config).run(run)
    shutil.rmtree(config.encoder.folder)  # the run needs it no more
    got = load_models(run, config, "encoder").encoder.state_dict()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert run.records()["encoder"]["parameters"] == sum(value.numel() for value in wanted.values())
    assert "steps" not in run.records()["encoder"]
    assert json.loads((run.bundle / "bundle.json").read_text())["parts"] == ["encoder"]


def test_preflight_refuses_an_absent_folder(submitted: tuple[Run, RunConfig]) -> None:
    _, config = submitted
    shutil.rmtree(config.encoder.folder)
    with pytest.raises(UserError, match=r"config\.json: not a readable"):
        check(config)


@pytest.mark.slow
def test_the_encoder_of_another_run(submitted: tuple[Run, RunConfig], tiny: list[str], tmp_path: Path) -> None:
    theirs = configuration.compose("train", [*tiny, f"run={tmp_path / 'theirs'}", "seed=5"])
    encoder = build_models(configuration.to_run_config(theirs)).encoder
    bundle_export.export(
        tmp_path / "theirs" / "bundle", configuration.to_run_config(theirs), {"encoder": encoder.state_dict()}
    )
    words = [*tiny, f"run={tmp_path / 'ours'}", f"encoder_weights={tmp_path / 'theirs'}"]
    config = configuration.compose("train", words)
    check(configuration.to_run_config(config))
    assert "parameters, loaded and not trained" in dry_run(config)
    run = submit(config)
    EncoderStage(configuration.to_run_config(config)).run(run)
    got = load_models(run, configuration.to_run_config(config), "encoder").encoder.state_dict()
    assert all(torch.equal(got[name], value) for name, value in encoder.state_dict().items())
    assert "steps" not in run.records()["encoder"]

    def refused(*changed: str) -> str:
        with pytest.raises(UserError) as caught:
            check(configuration.to_run_config(configuration.compose("train", [*words, *changed])))
        return str(caught.value)

    assert refused("encoder.latent_dim=16").endswith(
        "theirs has encoder.latent_dim=8, this run 16: it is another network"
    )
    assert refused(f"encoder_weights={tmp_path / 'nowhere'}").endswith("nowhere: no such run or bundle")
    bundle_export.export(tmp_path / "empty", configuration.to_run_config(theirs), {})
    assert refused(f"encoder_weights={tmp_path / 'empty'}").endswith("name a run whose encoder stage is finished")
