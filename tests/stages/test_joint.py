"""Joint training: whose gradient reaches what, and a tiny run from images to samples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests_support import dry_run, environment

from dvae.config import compose as configuration
from dvae.config import validate
from dvae.config.schema import TrainingConfig
from dvae.data.loading.loader import Batch
from dvae.errors import UserError
from dvae.inference import pipeline
from dvae.models import components
from dvae.stages.encoder import EncoderTask
from dvae.stages.joint import GradientTo, JointConfig, JointModel, JointTask
from dvae.stages.latent_sources import EncodedLatents
from dvae.stages.refiner import RefinerTask

CPU = torch.device("cpu")
TRAINING = TrainingConfig(batch=4, precision="fp32")
STAGES = "stages=[shards,joint,prior,evaluate]"


def made(tiny: list[str]) -> components.RunModels:
    return components.build_models(
        configuration.to_run_config(configuration.compose("train", [*tiny, "denoiser.data_scale=2"]))
    )


def batch(step: int = 0) -> Batch:
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    keys = torch.arange(4) + 4 * step
    return Batch(images=images, indices=torch.arange(4), keys=keys)


def gradients(tiny: list[str], config: JointConfig, step: int = 0) -> dict[str, torch.Tensor]:
    """Of every weight, for one batch."""
    built = made(tiny)
    joint = JointModel(built.encoder, built.denoiser, config)
    stage = JointTask("joint", joint, TRAINING, 0, CPU)
    stage.loss("joint", {"joint": joint}, batch(step)).loss.backward()
    return {name: weight.grad for name, weight in joint.named_parameters() if weight.grad is not None}


def alone(tiny: list[str], step: int = 0) -> dict[str, torch.Tensor]:
    """The same of the two stages that train one of them each."""
    built, found = made(tiny), {}
    stage = EncoderTask(built.encoder, TRAINING, 0, CPU)
    stage.loss("encoder", {"encoder": built.encoder}, batch(step)).loss.backward()
    found |= {f"encoder.{name}": weight.grad.clone() for name, weight in built.encoder.named_parameters()}
    refiner = RefinerTask(built.encoder, built.denoiser, EncodedLatents(built.encoder), TRAINING, 0, CPU)
    refiner.loss("refiner", {"refiner": built.denoiser}, batch(step)).loss.backward()
    return found | {f"denoiser.{n}": w.grad for n, w in built.denoiser.named_parameters() if w.grad is not None}


def test_without_a_way_to_the_encoder_it_is_both_stages_at_once(tiny: list[str]) -> None:
    ours, theirs = gradients(tiny, JointConfig(gradient_to=GradientTo.nothing)), alone(tiny)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5, msg=name)


def test_each_way_adds_to_the_encoders_gradient_by_its_weight(tiny: list[str]) -> None:
    """The gradient is linear in the ways and in the weight: both = z + x_hat, and twice the weight is twice the way."""
    base = gradients(tiny, JointConfig(gradient_to=GradientTo.nothing))
    ways = {
        name: {
            key: value - base[key]
            for key, value in gradients(tiny, JointConfig(gradient_to=reaches, weight=weight)).items()
            if key.startswith("encoder.")
        }
        for name, reaches, weight in (
            ("z", GradientTo.z, 1.0), ("x_hat", GradientTo.x_hat, 1.0), ("both", GradientTo.both, 1.0),
            ("twice", GradientTo.z, 2.0)
        )
    }  # fmt: skip
    encoder_only = "encoder.enc.in_conv.weight"
    decoder_only = "encoder.dec.last_conv.weight"
    assert ways["z"][decoder_only].abs().max() < 1e-4 < ways["x_hat"][decoder_only].abs().max()
    assert ways["x_hat"][encoder_only].abs().max() > 1e-4
    scale = ways["both"][encoder_only].abs().max()
    for key, value in ways["both"].items():
        torch.testing.assert_close(value, ways["z"][key] + ways["x_hat"][key], rtol=1e-3, atol=float(1e-3 * scale))
        torch.testing.assert_close(ways["twice"][key], 2 * ways["z"][key], rtol=1e-3, atol=float(1e-3 * scale))


def test_until_its_start_the_refiner_does_not_reach_the_encoder(tiny: list[str]) -> None:
    config = JointConfig(start=2)
    for step, same in ((0, True), (1, True), (2, False)):
        ours, apart = gradients(tiny, config, step), gradients(tiny, JointConfig(gradient_to=GradientTo.nothing), step)
        assert all(torch.equal(value, apart[name]) for name, value in ours.items()) is same


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("joint")
    words = [STAGES, "denoiser.data_scale=2", *(f"train_joint.{n}" for n in ("steps=4", "batch=8", "log_every=2"))]
    words += ["train_joint.warmup=1", "train_joint.preview_every=2"]
    command = [sys.executable, "-c", "import sys; from dvae.tools import launch; launch.command(sys.argv[1:])"]
    done = subprocess.run(
        [*command, *tiny, *words, "run=run"], cwd=folder, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.slow
def test_a_run_leaves_a_bundle_like_any_other(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [("joint", 2), ("joint", 4)]
    for row in rows:
        assert row["loss"] == pytest.approx(row["encoder"] + row["refiner"], rel=1e-5)
    names = {name.partition(".")[0] for name in load_file(run / "bundle" / "model.safetensors")}
    assert names == {"encoder", "prior", "denoiser"}
    assert pipeline.load(run).generate(2, 0)[1].shape == (2, 3, 16, 16)
    assert (run / "images" / "joint-00000004.png").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stages=[shards,encoder,joint,prior]"], "joint trains encoder and refiner together: leave encoder out"),
        (["denoiser.data_scale=null"], r"denoiser\.data_scale=null is measured with a trained encoder"),
        (["joint.weight=0"], r"joint\.weight=0: use more than 0"),
        (["encoder=kl_gan_demo", "prior=normal"], "needs an encoder to train without a discriminator, not kl_gan"),
        (["encoder=none", "prior=normal", "denoiser.condition_latent=false"], "needs an encoder to train"),
    ],
)
def test_what_does_not_go_together_is_refused(words: list[str], said: str, tiny: list[str]) -> None:
    own = [word for word in tiny if not (words[0].startswith("encoder=") and word.startswith(("encoder.", "prior.")))]
    composed = configuration.compose("train", [*own, STAGES, "denoiser.data_scale=2", *words])
    with pytest.raises(UserError, match=said):
        validate.check(configuration.to_run_config(composed))


def test_a_dry_run_tells_of_it(tiny: list[str], tmp_path: Path) -> None:
    words = [
        *tiny,
        f"run={tmp_path}/run",
        STAGES,
        "denoiser.data_scale=2",
        "train_joint.steps=7",
        "train_joint.batch=8",
    ]
    assert "M parameters, 7 steps of 8 images" in dry_run(configuration.compose("train", words))
