"""Counts on fake tensors against closed forms, and against what real tensors do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dvae.layers.activation_checkpointing import maybe_checkpoint
from dvae.layers.attention import AttentionBackend, attention
from dvae.models import components
from dvae.planning import counting, passes
from dvae.planning.counting import ForwardPass, OperationCounter, Operations
from dvae.planning.plan_run import compose_recipe

BATCH = 3
TINY = [
    "recipe=demo", "image_size=16", "encoder.resolutions=[8,4,1]", "encoder.channels=[16,16,32]",
    "encoder.encoder_blocks=[1,1,1]", "encoder.decoder_blocks=[1,1,1]", "encoder.latent_dim=8", "prior.components=2",
    "refiner.width=32", "refiner.multipliers=[1,2]", "refiner.blocks=1",
]  # fmt: skip


def of(module: nn.Module, *shape: int) -> ForwardPass:
    """A pass that sums up what a module makes of images (B, *shape)."""
    return ForwardPass(
        module, (), lambda batch: (torch.zeros(batch, *shape),), lambda device, x: (x.to(device),),
        lambda x: module(x).float().sum(),
    )  # fmt: skip


@pytest.mark.parametrize("bf16", [False, True])
def test_a_linear_layer_is_counted_by_its_formula(bf16: bool) -> None:
    found = counting.count_pass(of(nn.Linear(32, 48), 32), BATCH, bf16)
    assert found.trained == Operations(0, 2 * 2 * BATCH * 32 * 48)  # y = x w', and w's gradient; x has none


@pytest.mark.parametrize("bf16", [False, True])
def test_a_convolution_is_counted_by_its_formula(bf16: bool) -> None:
    two = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 6, 3, stride=2, padding=1))
    first, second = 2 * BATCH * 256 * 9 * 4 * 8, 2 * BATCH * 64 * 9 * 8 * 6
    found = counting.count_pass(of(two, 4, 16, 16), BATCH, bf16)
    assert found.trained == Operations(2 * first + 3 * second, 0)  # the first needs no gradient of its input


class Attention(nn.Module):
    """Fused attention of x (B, L, heads, D) with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return attention(x * self.scale, x * self.scale, x * self.scale, AttentionBackend.sdpa)


def test_attention_is_counted_by_its_formula_and_keeps_no_square() -> None:
    product = 2 * BATCH * 4 * 128 * 128 * 16
    found = counting.count_pass(of(Attention(), 128, 4, 16), BATCH, False)
    assert found.trained == Operations(0, (2 + 5) * product)  # scores are computed again for the gradient
    for bf16 in (False, True):
        assert counting.saved_bytes(of(Attention(), 128, 4, 16), BATCH, "cuda", bf16) < 4 * BATCH * 4 * 128 * 128


def test_operations_are_those_of_torchs_own_counter() -> None:
    made = components.build_models_on_meta(compose_recipe([*TINY, "refiner.attention_resolutions=[]"]))
    refiner = passes.refiner_pass(made, encodes=True, decodes=True)
    drawn = refiner.draw(BATCH)
    with (
        counting.fake_pass(refiner, "cpu"),
        counting.autocast_as_trained("cpu", True),
        FlopCounterMode(display=False) as known,
    ):
        refiner.loss(*refiner.prepare("cpu", *drawn)).backward()
    found = counting.count_pass(refiner, BATCH, True)
    assert (found.frozen + found.trained).total == known.get_total_flops()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("stage", ["encoder", "refiner"])
def test_a_real_forward_pass_keeps_the_counted_bytes(stage: str, again: bool, bf16: bool) -> None:
    config = compose_recipe([*TINY, f"refiner.checkpoint_blocks={str(again).lower()}"])

    def one(made: components.RunModels) -> ForwardPass:
        return passes.encoder_passes(made)["encoder"] if stage == "encoder" else passes.refiner_pass(made, True, True)

    real = counting.saved_bytes(one(components.build_models(config)), BATCH, "cpu", bf16, faked=False)
    # in bf16 a real CPU's kernels round some small workspaces up
    assert counting.saved_bytes(one(components.build_models_on_meta(config)), BATCH, "cpu", bf16) == pytest.approx(
        real, rel=0.005 * bf16
    )


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.tanh(self.first(x)))


class Blocks(nn.Module):
    def __init__(self, again: bool) -> None:
        super().__init__()
        self.blocks, self.again = nn.ModuleList(Block() for _ in range(8)), again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = maybe_checkpoint(self.again, block, x)
        return x


@pytest.mark.parametrize("again", [False, True])
def test_the_most_that_is_alive_is_that_of_real_tensors(again: bool) -> None:
    images, unit = 512, 4 * 512 * 16
    module = Blocks(again)
    for weight in module.parameters():
        weight.grad = torch.zeros_like(weight)
    with OperationCounter() as real:
        module(torch.zeros(images, 16)).float().sum().backward()
    with torch.device("meta"):
        counted = counting.count_pass(of(Blocks(again), 16), images, False)
    assert counted.peak == pytest.approx(real.peak, abs=unit)  # what the hooks that count keep hold of
    assert counted.kept == (7 if again else 15) * unit + (unit if again else 0) + (0 if again else unit)
    assert counted.peak < (8 + 6) * unit if again else counted.peak > 16 * unit


def test_computing_again_costs_a_forward_pass() -> None:
    with torch.device("meta"):
        plain, again = (counting.count_pass(of(Blocks(way), 16), 512, False).trained.total for way in (False, True))
    forward = 16 * 2 * 512 * 16 * 16
    assert plain == 3 * forward - forward // 16  # the first layer's input needs no gradient
    # the last layer of a block keeps nothing that only its output would tell, so torch stops short of it
    assert plain + forward // 2 <= again <= plain + forward


def test_cudas_autocast_keeps_group_norm_in_fp32() -> None:
    norm = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 1))
    there, here = (counting.saved_bytes(of(norm, 8, 64, 64), 16, device, True) for device in ("cuda", "cpu"))
    image = 16 * 8 * 64 * 64
    # on both the inputs of the convolutions in bf16; the norm's in bf16 on a CPU, in fp32 on a GPU
    assert there - here == pytest.approx((4 - 2) * image, rel=0.01)


def test_arithmetic_is_put_back() -> None:
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with counting.autocast_as_trained("cuda", True):
        assert torch.is_autocast_enabled("cuda")
        assert torch.get_autocast_dtype("cuda") is torch.bfloat16
    assert (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")) == before
