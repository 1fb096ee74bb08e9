"""Layers with weights in fewer bytes, and layers that compute in int8, against the layers that they stand for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dvae.errors import UserError
from dvae.models.quantization import integer_layer as integer
from dvae.models.quantization.integer_layer import IntegerLayer, TimeBucket
from dvae.models.quantization.quantized_layers import StorageFormat, StoredLayer, quantizable

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(48, 20), (3, 5, 48)),
    "linear without bias": (lambda: nn.Linear(33, 7, bias=False), (4, 33)),
    "conv 3x3": (lambda: nn.Conv2d(16, 24, 3, padding=1), (2, 16, 6, 6)),
    "conv of stride 2": (lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1), (2, 16, 6, 6)),
    "conv 1x1": (lambda: nn.Conv2d(16, 8, 1, bias=False), (2, 16, 4, 4)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def layer_and_input(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make().requires_grad_(False)
    if layer.bias is not None:
        layer.bias.copy_(layer.bias.to(torch.bfloat16))  # as it is stored
    return layer, torch.randn(shape) + 0.3


def summed(layer: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """|w| |x|, summed as the layer does: what an error of each product can come to."""
    if isinstance(layer, nn.Linear):
        return F.linear(x.abs().double(), weight.abs().double())
    return F.conv2d(x.abs().double(), weight.abs().double(), None, layer.stride, layer.padding)


def steps_like(layer: nn.Module, scales: torch.Tensor) -> torch.Tensor:
    """A weight whose entries are half a step each."""
    return 0.5 * scales.float().view(-1, *[1] * (layer.weight.ndim - 1)).expand_as(layer.weight)


@every_layer
@pytest.mark.parametrize("store", [StorageFormat.int8, StorageFormat.int4, StorageFormat.bf16])
def test_a_stored_layer_is_within_half_a_step_of_each_weight(name: str, store: StorageFormat) -> None:
    layer, x = layer_and_input(name)
    made = StoredLayer(layer, store, 8)
    error = (made(x).double() - layer(x).double()).abs()
    off = (made.weight_in(torch.float32) - layer.weight).abs()
    assert (error <= summed(layer, off, x) + 1e-5).all()
    if store is StorageFormat.int8:
        assert (off <= steps_like(layer, made.scales) * (1 + 1e-6)).all()
    assert made(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x).dtype == torch.bfloat16
        torch.testing.assert_close(made(x).float(), made(x.float()).float())
    assert not list(made.parameters())


def test_memory_is_what_the_store_says() -> None:
    layer = nn.Conv2d(64, 32, 3)
    count, channels = layer.weight.numel(), 32
    held = {
        store: sum(buffer.nbytes for buffer in StoredLayer(layer, store, 32).buffers()) - 2 * channels
        for store in (StorageFormat.bf16, StorageFormat.int8, StorageFormat.int4)
    }
    assert held == {
        StorageFormat.bf16: 2 * count,
        StorageFormat.int8: count + 2 * channels,
        StorageFormat.int4: count // 2 + 2 * count // 32,
    }
    assert StoredLayer(layer, StorageFormat.int8, 0).codes.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["linear", "conv 3x3"])
def test_gradients_reach_the_input_of_a_stored_layer(name: str) -> None:
    layer, x = layer_and_input(name)
    made = StoredLayer(layer, StorageFormat.int8, 0)
    found, wanted = (torch.func.grad(lambda x, f=f: f(x).square().sum())(x) for f in (made, layer))
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def integer_layer(layer: nn.Module, x: torch.Tensor, buckets: int = 1) -> IntegerLayer:
    made = IntegerLayer(layer, TimeBucket(buckets))
    made.calibrate(x.amin().expand(buckets + 1).clone(), x.amax().expand(buckets + 1).clone())
    made.pack_weights()
    return made


@every_layer
def test_an_integer_layer_is_within_the_steps_of_weight_and_input(name: str) -> None:
    layer, x = layer_and_input(name)
    made = integer_layer(layer, x)
    out = made(x)
    assert out.dtype == torch.float32
    assert out.shape == layer(x).shape
    step = float(made.input_scales[0]) * torch.ones_like(x) * (0.5 + 1e-3)
    half = steps_like(layer, made.scales)
    # |w x - (w + a)(x + b)| <= |a| |x| + |w| |b| + |a| |b|
    bound = summed(layer, half, x) + summed(layer, layer.weight, step) + summed(layer, half, step)
    error = (out.double() - layer(x).double()).abs()
    assert (error <= bound + 1e-5).all()
    assert error.max() > 0
    with torch.autocast("cpu", torch.bfloat16):
        low = made(x)
    assert low.dtype == torch.bfloat16
    assert (low.float() - layer(x)).norm() < 0.03 * layer(x).norm()
    assert made.packed_bytes == layer.weight.numel()
    assert made.codes.nbytes == 0


def test_an_integer_layer_is_exact_where_both_are_representable() -> None:
    layer = nn.Linear(3, 2, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.tensor([[127.0, -3.0, 5.0], [1.0, 127.0, 0.0]]))
    x = torch.tensor([[-28.0, 0.0, 227.0], [3.0, 100.0, -1.0]])  # 255 steps of 1 from -28
    assert torch.equal(integer_layer(layer, x)(x), layer(x))


def test_zero_is_exact_and_ranges_include_it() -> None:
    scales, zeros = integer.affine(torch.tensor([2.0, -3.0, 0.0]), torch.tensor([5.1, -1.0, 0.0]))
    torch.testing.assert_close(scales[:2], torch.tensor([5.1 / 255, 3.0 / 255]))
    assert zeros.tolist() == [-128, 127, -128]
    for scale, zero in zip(scales.tolist(), zeros.tolist(), strict=True):
        assert integer.to_int8(torch.zeros(3), scale, zero).tolist() == [zero] * 3


def test_what_is_out_of_range_is_clipped() -> None:
    assert integer.to_int8(torch.tensor([-9.0, 9.0, 0.26]), 0.5, 0).tolist() == [-18, 18, 1]
    assert integer.to_int8(torch.tensor([-900.0, 900.0]), 0.5, 3).tolist() == [-128, 127]


def test_the_scale_follows_the_time() -> None:
    time_bucket = TimeBucket(4)
    for times, bucket in (([0.0], 0), ([249.0], 0), ([250.0, 499.0], 1), ([1000.0], 3), ([10.0, 900.0], 4)):
        time_bucket.observe(nn.Identity(), (torch.empty(0), torch.tensor(times)))
        assert time_bucket.bucket == bucket, times
    layer = nn.Linear(1, 1, bias=False).requires_grad_(False)
    layer.weight.fill_(1.0)
    made = IntegerLayer(layer, time_bucket)
    made.calibrate(torch.zeros(5), torch.tensor([1.0, 2.0, 4.0, 8.0, 8.0]))
    made.pack_weights()
    found = []
    for bucket in range(5):
        time_bucket.bucket = bucket
        found.append(made(torch.tensor([[100.0]])).item())
    torch.testing.assert_close(torch.tensor(found), torch.tensor([1.0, 2.0, 4.0, 8.0, 8.0]), rtol=0.01, atol=0)


def test_an_integer_layer_has_no_gradients_and_says_so() -> None:
    layer, x = layer_and_input("linear")
    with pytest.raises(UserError, match="no gradients: use the original"):
        integer_layer(layer, x)(x.requires_grad_())


def test_a_pytorch_without_the_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    integer.check_machine()
    monkeypatch.setattr(integer, "NEEDED", (*integer.NEEDED, "no_such_kernel"))
    with pytest.raises(UserError, match=r"method=int8 needs oneDNN's no_such_kernel.*use method=int8_weights"):
        integer.check_machine()


def test_layers_that_are_not_known_are_left_alone() -> None:
    assert quantizable(nn.Linear(2, 2))
    assert quantizable(nn.Conv2d(2, 2, 3))
    others = [nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 2, 3, padding="same"), nn.Identity()]
    others += [nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), nn.ConvTranspose2d(2, 2, 3)]
    assert not any(quantizable(layer) for layer in others)
