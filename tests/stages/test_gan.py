"""An encoder and a discriminator on two engines: who moves when, what reaches whom, resume bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from dvae.config.schema import EmaConfig, Precision, TrainingConfig
from dvae.data.loading.loader import Batch
from dvae.layers.adversarial import GanLoss, generator_loss
from dvae.registry.core import Shapes
from dvae.registry.encoders.base import ENCODERS, Adversary, Encoder, Posterior, squared_error
from dvae.stages.gan import GanTask
from dvae.training.engine.deepspeed_engine import Engine, start_distributed
from dvae.training.loop import train_step
from dvae.training.resilience.checkpoint import Checkpoints
from dvae.training.train_state import TrainState, save_checkpoint

START, BATCH = 2, 4
TINY = {"name": "kl_gan", "channels": [8, 8], "groups": 4, "discriminator_width": 8, "discriminator_layers": 2}


@pytest.fixture(autouse=True, scope="module")
def _distributed() -> None:
    start_distributed()


class Linear(Encoder):
    """x_hat = w z per pixel, z = x: small enough for every gradient to be written down."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.latent_shape = (1, 2, 2)
        self.last = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(self.last.weight, 0.5)

    def encode(self, x: torch.Tensor) -> Posterior:
        return Posterior(x, torch.zeros_like(x))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.last(z)

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        x_hat = self.last(x)
        return {"loss": squared_error(x, x_hat), "x_hat": x_hat, "features": x}


def gan(stage: int = 0, precision: Precision = Precision.fp32, micro: int = 1, **fields: object) -> GanTask:
    torch.manual_seed(0)
    encoder = ENCODERS.build(TINY | {"discriminator_start": START} | fields, Shapes(image_size=16))
    config = TrainingConfig(
        batch=BATCH, micro_batches=micro, lr=1e-3, warmup=0, zero_stage=stage, precision=precision,
        weight_decay=0.1, ema=EmaConfig(decay=0.5),
    )  # fmt: skip
    adversary = encoder.adversary()
    assert adversary is not None
    return GanTask(encoder, adversary, config, seed=1, device=torch.device("cpu"))


def engines_of(stage: GanTask) -> dict[str, Engine]:
    return {name: Engine(module, stage.config) for name, module in stage.modules().items()}


def batches(number: int, micro: int = 1) -> list[Batch]:
    """The micro-batches of step `number` (from 1)."""
    draw = torch.Generator().manual_seed(number)
    keys = torch.arange((number - 1) * BATCH, number * BATCH)
    images = torch.randint(0, 256, (BATCH, 3, 16, 16), generator=draw, dtype=torch.uint8)
    return [Batch(k, k, i) for k, i in zip(keys.chunk(micro), images.chunk(micro), strict=True)]


def steps(stage: GanTask, engines: dict[str, Engine], first: int, last: int, run: Path) -> list[dict[str, float]]:
    state, rows = TrainState(step=first - 1), []
    for number in range(first, last + 1):
        train_step(stage, engines, batches(number, stage.config.micro_batches), state, run)
        rows.append(state.pop_means())
    return rows


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return copy.deepcopy(engine.module.state_dict())


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_discriminator_waits_for_its_start(tmp_path: Path) -> None:
    stage = gan()
    engines = engines_of(stage)
    before = weights(engines["discriminator"])
    rows = steps(stage, engines, 1, START, tmp_path)
    assert same(before, weights(engines["discriminator"]))
    assert not any(name in row for row in rows for name in ("generator", "discriminator", "adaptive_weight"))
    (row,) = steps(stage, engines, START + 1, START + 1, tmp_path)
    assert not same(before, weights(engines["discriminator"]))
    assert {"loss", "reconstruction", "kl", "generator", "adaptive_weight", "discriminator"} <= row.keys()
    assert 0 < row["confidence_real"] < 1
    assert 0 < row["confidence_fake"] < 1
    assert row["grad_norm_encoder"] > 0 < row["grad_norm_discriminator"]
    assert stage.fakes == {}


def test_before_the_start_it_is_the_encoder_alone(tmp_path: Path) -> None:
    with_gan, without = gan(), gan(discriminator_start=100)
    first, second = engines_of(with_gan), engines_of(without)
    steps(with_gan, first, 1, START, tmp_path)
    steps(without, second, 1, START, tmp_path)
    assert same(weights(first["encoder"]), weights(second["encoder"]))
    steps(with_gan, first, START + 1, START + 1, tmp_path)
    steps(without, second, START + 1, START + 1, tmp_path)
    assert not same(weights(first["encoder"]), weights(second["encoder"]))


def test_until_it_is_heard_it_is_the_encoder_alone(tmp_path: Path) -> None:
    with_gan, without = gan(discriminator_start=1, discriminator_warmup=2), gan(discriminator_start=100)
    first, second = engines_of(with_gan), engines_of(without)
    untrained = weights(first["discriminator"])
    rows = steps(with_gan, first, 1, 3, tmp_path)
    steps(without, second, 1, 3, tmp_path)
    assert [("discriminator" in row, "generator" in row) for row in rows] == [(False, False), *[(True, False)] * 2]
    assert not same(untrained, weights(first["discriminator"]))
    assert same(weights(first["encoder"]), weights(second["encoder"]))
    (row,) = steps(with_gan, first, 4, 4, tmp_path)
    assert "generator" in row
    assert with_gan.fakes == {}


def test_each_gradient_reaches_its_own_module_alone() -> None:
    stage = gan(discriminator_start=0)
    engines = engines_of(stage)
    (batch,) = batches(1)
    encoder, discriminator = stage.encoder, stage.adversary.discriminator
    engines["encoder"].backward(stage.loss("encoder", engines, batch).loss)
    assert all(p.grad is None for p in discriminator.parameters())
    assert all(p.grad is not None for p in encoder.parameters())
    assert any(p.grad.any() for p in encoder.parameters())
    kept = [p.grad.clone() for p in encoder.parameters()]
    engines["discriminator"].backward(stage.loss("discriminator", engines, batch).loss)
    assert all(p.grad is not None for p in discriminator.parameters())
    assert any(p.grad.any() for p in discriminator.parameters())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(encoder.parameters(), kept, strict=True))


@pytest.mark.parametrize("kind", list(GanLoss))
def test_gradient_is_that_of_the_weighted_sum(kind: GanLoss) -> None:
    """Against loss = reconstruction + weight * adversarial in one plain graph, the weight by autograd."""
    stage = gan(discriminator_start=0, gan_loss=kind.value, discriminator_weight=0.7)
    (batch,) = batches(1)
    x, encoder = stage.images(batch), stage.encoder
    stage.loss("encoder", stage.modules(), batch).loss.backward()
    got = {name: p.grad.clone() for name, p in encoder.named_parameters()}
    encoder.zero_grad()
    terms = encoder(x, stage.posterior_noise(batch, encoder))
    deceit = generator_loss(kind, stage.adversary.discriminator(terms["x_hat"])).mean()
    last = stage.adversary.last_layer.weight
    (pull,) = torch.autograd.grad(terms["reconstruction"].mean(), last, retain_graph=True)
    (push,) = torch.autograd.grad(deceit, last, retain_graph=True)
    weight = 0.7 * pull.norm() / (push.norm() + 1e-4)
    (terms["loss"].mean() + weight * deceit).backward()
    largest = max(float(p.grad.abs().max()) for p in encoder.parameters())
    for name, p in encoder.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-6 * largest, msg=name)
    plain = encoder(x, stage.posterior_noise(batch, encoder))["loss"].mean()
    (without,) = torch.autograd.grad(plain, last)
    assert not torch.allclose(got["autoencoder.decoder.conv_out.weight"], without, rtol=0.05)


def test_adaptive_weight_by_hand() -> None:
    """x = 1 on 2 x 2 pixels, w = 1/2: the error is 4 (1 - w)^2 / 4, its slope -1; a critic 3 * mean(x_hat) has 3."""
    encoder, critic = Linear(), nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(critic.weight, 3.0)
    adversary = Adversary(critic, GanLoss.hinge, 0.8, 0, 0, 1.0, encoder.last, squared_error)
    config = TrainingConfig(batch=1, precision=Precision.fp32)
    stage = GanTask(encoder, adversary, config, seed=0, device=torch.device("cpu"))
    image = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    out = stage.loss("encoder", stage.modules(), Batch(torch.tensor([0]), torch.tensor([0]), image))
    assert out.metrics["loss"] == (0.25, 1.0)
    assert out.metrics["generator"][0] == pytest.approx(-1.5)
    assert out.metrics["adaptive_weight"][0] == pytest.approx(0.8 * 1.0 / (3.0 + 1e-4))
    out.loss.backward()
    assert float(encoder.last.weight.grad) == pytest.approx(-1.0 - 0.8 / (3.0 + 1e-4) * 3.0)


@pytest.mark.parametrize("zero", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2, 3))])
def test_resume_is_bit_for_bit_at_every_zero_stage(zero: int, tmp_path: Path) -> None:
    """Saved once before the discriminator ever moved and once after; with accumulation and in bf16."""
    settings = {"stage": zero, "precision": Precision.bf16, "micro": 2}
    whole = gan(**settings)
    engines = engines_of(whole)
    expected = steps(whole, engines, 1, 4, tmp_path)
    for stop in (1, 3):
        checkpoints = Checkpoints(tmp_path / f"stop{stop}", keep=1)
        first = gan(**settings)
        begun = engines_of(first)
        steps(first, begun, 1, stop, tmp_path)
        with checkpoints:
            save_checkpoint(begun, checkpoints, TrainState(step=stop))
        second = gan(**settings)
        resumed = engines_of(second)
        found = checkpoints.newest()
        assert found is not None
        for name, engine in resumed.items():
            engine.load(found[0] / name)
        assert steps(second, resumed, stop + 1, 4, tmp_path) == expected[stop:]
        for name, engine in resumed.items():
            assert same(engine.averaged_weights(), engines[name].averaged_weights())


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_zero_stages_agree(zero: int, tmp_path: Path) -> None:
    plain, other = gan(), gan(stage=zero)
    wanted = steps(plain, engines_of(plain), 1, 4, tmp_path)
    got = steps(other, engines_of(other), 1, 4, tmp_path)
    for one, two in zip(wanted, got, strict=True):
        assert one == pytest.approx(two, rel=2e-3)


def test_a_discriminator_learns_to_tell_noise_from_gray() -> None:
    """Real images are noise, reconstructions of an untrained decoder are nearly gray: easily told apart."""
    stage = gan(discriminator_start=0)
    discriminator = stage.adversary.discriminator
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=3e-3)
    (batch,) = batches(1)
    for _ in range(30):
        stage.loss("encoder", stage.modules(), batch)
        out = stage.loss("discriminator", stage.modules(), batch)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    real, fake = (total / count for total, count in (out.metrics["confidence_real"], out.metrics["confidence_fake"]))
    assert real > 0.6 > 0.4 > fake
