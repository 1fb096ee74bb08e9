"""Two ranks against one process that takes each batch in two parts: every kind of stage, bf16, ZeRO 0 to 3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from spawned_ranks import on_ranks

from dvae.config import compose as configuration
from dvae.config.schema import Precision, TrainingConfig
from dvae.data.loading.loader import Batch
from dvae.models import components
from dvae.registry.core import Shapes
from dvae.registry.encoders.base import ENCODERS
from dvae.stages.classifier import ClassifierTask
from dvae.stages.encoder import EncoderTask
from dvae.stages.gan import GanTask
from dvae.stages.latent_sources import EncodedLatents
from dvae.stages.refiner import RefinerTask
from dvae.training.engine.deepspeed_engine import Engine, start_distributed
from dvae.training.loop import accumulate_gradients
from dvae.training.metric_sums import add_metric_sums
from dvae.training.resilience import ranks
from dvae.training.train_state import TrainState
from dvae.training.train_task import TrainTask
from dvae.utils import rng

pytestmark = pytest.mark.slow  # 20 trainings
BATCH, STEPS, SIZE = 8, 20, 16
KINDS = ["encoder", "refiner", "classifier", "gan"]
CPU = torch.device("cpu")
GAN = {
    "name": "kl_gan", "channels": [8, 8], "groups": 4, "discriminator_width": 8, "discriminator_layers": 2,
    "discriminator_start": 3, "discriminator_warmup": 2,
}  # fmt: skip


def make(kind: str, words: list[str], zero: int) -> TrainTask:
    """A stage of the demo in small, dropout 0; `words` are those of the fixture `tiny`."""
    torch.manual_seed(0)
    training = TrainingConfig(
        batch=BATCH, micro_batches=2 // ranks.world_size(), lr=3e-4, warmup=0, zero_stage=zero,
        precision=Precision.bf16, steps=STEPS,
    )  # fmt: skip
    if kind == "gan":
        encoder = ENCODERS.build(GAN, Shapes(image_size=SIZE))
        adversary = encoder.adversary()
        assert adversary is not None
        return GanTask(encoder, adversary, training, seed=1, device=CPU)
    classes = (
        ["data.label=hair", "classes=[a,b,c]", "classifier=half_unet_demo", "classifier.width=32"]
        if kind == "classifier"
        else []
    )
    config = configuration.to_run_config(configuration.compose("train", [*words, *classes, "run=nowhere"]))
    made = components.build_models(config)
    if kind == "encoder":
        return EncoderTask(made.encoder, training, 1, CPU)
    if kind == "refiner":
        return RefinerTask(made.encoder, made.denoiser, EncodedLatents(made.encoder), training, 1, CPU)
    assert made.classifier is not None
    return ClassifierTask(made.classifier, made.encoder, made.denoiser, EncodedLatents(made.encoder), training, 1, CPU)


def parts(number: int) -> list[Batch]:
    """This rank's micro-batches of step `number`: halves of the batch."""
    keys = torch.arange((number - 1) * BATCH, number * BATCH)
    images = torch.floor(128 + 60 * rng.normal(0, "images", keys.tolist(), (3, SIZE, SIZE))).clamp(0, 255).byte()
    halves = [Batch(k, k, i, k % 3) for k, i in zip(keys.chunk(2), images.chunk(2), strict=True)]
    return halves if ranks.world_size() == 1 else [halves[ranks.rank()]]


def trained(stage: TrainTask) -> dict[str, Any]:
    """Gradient norm of each parameter at its first step, and the figures of each step, over all ranks."""
    engines = {name: Engine(module, stage.module_config(name)) for name, module in stage.modules().items()}
    norms: dict[str, float] = {}
    losses = []
    for number in range(1, STEPS + 1):
        figures = accumulate_gradients(stage, engines, parts(number), number)
        for name, engine in engines.items():
            if stage.trains(name, number):
                if not any(known.startswith(f"{name}.") for known in norms):
                    norms |= {f"{name}.{layer}": norm for layer, norm in engine.gradient_norms().items()}
                assert engine.step(number)
        state = TrainState()
        for part in figures:
            state.add_metrics(part)
        state.sums = add_metric_sums(ranks.all_gather(state.sums))
        losses.append({key: value for key, value in state.pop_means().items() if key in ("loss", "discriminator")})
    for engine in engines.values():
        engine.close()
    return {"norms": norms, "losses": losses}


def a_rank(number: int, words: list[str], out: Path) -> None:
    found = {f"{kind} {zero}": trained(make(kind, words, zero)) for kind in KINDS for zero in range(4)}
    if number == 0:
        out.write_text(json.dumps(found))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("agreement") / "two.json"
    on_ranks(2, a_rank, tiny, out)
    return json.loads(out.read_text())


@pytest.fixture(scope="module", params=KINDS)
def one(request: pytest.FixtureRequest, tiny: list[str]) -> tuple[str, dict[str, Any]]:
    start_distributed()
    torch.set_num_threads(1)
    return request.param, trained(make(request.param, tiny, 0))


@pytest.mark.parametrize("zero", range(4))
def test_two_ranks_agree_with_one(one: tuple[str, dict[str, Any]], two: dict[str, Any], zero: int) -> None:
    kind, mine = one
    theirs = two[f"{kind} {zero}"]
    assert theirs["norms"].keys() == mine["norms"].keys()
    for layer, norm in mine["norms"].items():
        assert theirs["norms"][layer] == pytest.approx(norm, rel=1e-5, abs=1e-5 * max(mine["norms"].values())), layer
    for ours, its in zip(mine["losses"], theirs["losses"], strict=True):
        assert its.keys() == ours.keys()
        assert its["loss"] == pytest.approx(ours["loss"], rel=1e-3)
        if "discriminator" in ours:  # a difference of bf16 logits of like size
            assert its["discriminator"] == pytest.approx(ours["discriminator"], rel=5e-3)
