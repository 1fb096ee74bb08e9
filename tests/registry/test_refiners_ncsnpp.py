from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dvae.registry.classifiers.base import CLASSIFIERS
from dvae.registry.core import Shapes
from dvae.registry.refiners.base import REFINERS, NetworkCondition

BEST = {"multipliers": [2, 2, 2], "blocks": 8, "fir": True, "progressive_input": True, "time": "fourier"}


def shapes(registry, node: dict, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in registry.build(node, shapes).state_dict().items()}


def test_names_of_the_public_checkpoints():
    keys = shapes(REFINERS, {"name": "ncsnpp"}, Shapes(image_size=32, k=2))
    wanted = {
        "all_modules.0.weight": (512, 128),
        "all_modules.1.bias": (512,),
        "all_modules.2.weight": (128, 6, 3, 3),
        "all_modules.3.GroupNorm_0.weight": (128,),
        "all_modules.4.Dense_0.weight": (128, 512),
        "all_modules.5.Conv_2.weight": (128, 128, 1, 1),  # halves: a skip convolution though channels stay
        "all_modules.6.Conv_2.weight": (256, 128, 1, 1),
        "all_modules.7.NIN_0.W": (256, 256),
        "all_modules.9.NIN_3.b": (256,),
        "all_modules.15.GroupNorm_1.bias": (256,),
        "all_modules.17.GroupNorm_0.weight": (256,),
        "all_modules.19.Conv_0.weight": (256, 512, 3, 3),
        "all_modules.22.Conv_2.weight": (256, 256, 1, 1),
        "all_modules.29.Conv_0.weight": (256, 384, 3, 3),
        "all_modules.30.NIN_1.b": (256,),
        "all_modules.32.GroupNorm_0.weight": (384,),
        "all_modules.35.weight": (128,),
        "all_modules.36.weight": (6, 128, 3, 3),
    }
    assert {key: keys.get(key) for key in wanted} == wanted
    assert {key.partition(".")[0] for key in keys} == {"all_modules"}
    assert not any(key.startswith("all_modules.37") for key in keys)


def test_names_of_the_public_checkpoints_with_pyramid_and_fourier_features():
    keys = shapes(REFINERS, {"name": "ncsnpp", **BEST}, Shapes(image_size=32, k=2))
    wanted = {
        "all_modules.0.W": (128,),
        "all_modules.1.weight": (512, 256),
        "all_modules.3.weight": (128, 6, 3, 3),
        "all_modules.13.Conv2d_0.weight": (256, 6, 3, 3),
        "all_modules.29.NIN_2.W": (256, 256),
        "all_modules.31.Conv2d_0.bias": (256,),
        "all_modules.62.NIN_0.W": (256, 256),
        "all_modules.63.Conv_2.weight": (256, 256, 1, 1),
        "all_modules.74.weight": (6, 256, 3, 3),
    }
    assert {key: keys.get(key) for key in wanted} == wanted


def test_names_of_the_public_classifier():
    node = {"name": "ncsnpp_classifier", "multipliers": [1, 2, 3, 4], "blocks": 4, "attention_resolutions": [16, 8]}
    keys = shapes(CLASSIFIERS, node, Shapes(image_size=32, k=2, labels=10))
    # 2 of time, stem, 4 blocks, then down + 8, down + 8, down + 4: the middle is 30 to 32
    assert keys["all_modules.30.Conv_1.weight"] == (512, 512, 3, 3)
    assert keys["all_modules.31.NIN_0.W"] == (512, 512)
    assert keys["all_modules.33.weight"] == (10, 512 * 4 * 4)
    assert "all_modules.33.bias" not in keys


class Plain:
    """NCSN++ from a state dict, written out: one module after the other, the number of levels known."""

    def __init__(self, state: dict[str, torch.Tensor], fir: bool) -> None:
        self.state, self.fir, self.index = state, fir, -1

    def parts(self) -> dict[str, torch.Tensor]:
        self.index += 1
        prefix = f"all_modules.{self.index}."
        return {key.removeprefix(prefix): value for key, value in self.state.items() if key.startswith(prefix)}

    def norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, min(x.shape[1] // 4, 32), weight, bias, 1e-6)

    def change(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8
        kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)
        if factor < 1:
            return F.conv2d(x, kernel, None, 2, 1, 1, len(kernel)) if self.fir else F.avg_pool2d(x, 2)
        if self.fir:
            return F.conv_transpose2d(x, 4 * kernel, None, 2, 1, 0, len(kernel))
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def block(self, x: torch.Tensor, embedding: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        p = self.parts()
        h = F.silu(self.norm(x, p["GroupNorm_0.weight"], p["GroupNorm_0.bias"]))
        if factor != 1:
            h, x = self.change(h, factor), self.change(x, factor)
        h = F.conv2d(h, p["Conv_0.weight"], p["Conv_0.bias"], padding=1)
        h = h + F.linear(F.silu(embedding), p["Dense_0.weight"], p["Dense_0.bias"])[:, :, None, None]
        h = F.silu(self.norm(h, p["GroupNorm_1.weight"], p["GroupNorm_1.bias"]))
        h = F.conv2d(h, p["Conv_1.weight"], p["Conv_1.bias"], padding=1)
        if "Conv_2.weight" in p:
            x = F.conv2d(x, p["Conv_2.weight"], p["Conv_2.bias"])
        return (x + h) / 2**0.5

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        p = self.parts()
        h = self.norm(x, p["GroupNorm_0.weight"], p["GroupNorm_0.bias"])
        q, k, v = (torch.einsum("bchw,cd->bdhw", h, p[f"NIN_{i}.W"]) + p[f"NIN_{i}.b"][:, None, None] for i in range(3))
        scores = torch.einsum("bchw,bcij->bhwij", q, k) / x.shape[1] ** 0.5
        h = torch.einsum("bhwij,bcij->bchw", scores.flatten(3).softmax(3).view_as(scores), v)
        h = torch.einsum("bchw,cd->bdhw", h, p["NIN_3.W"]) + p["NIN_3.b"][:, None, None]
        return (x + h) / 2**0.5

    def pyramid(self, x: torch.Tensor) -> torch.Tensor:
        p = self.parts()
        if not self.fir:
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), p["Conv_0.weight"], p["Conv_0.bias"], stride=2)
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8
        x = F.conv2d(x, torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4), None, 1, 2, 1, x.shape[1])
        return F.conv2d(x, p["Conv2d_0.weight"], p["Conv2d_0.bias"], stride=2)

    def embed(self, t: torch.Tensor, fourier: bool, time_scale: float) -> torch.Tensor:
        if fourier:
            angles = 2 * math.pi * t.log()[:, None] * self.parts()["W"]
        else:
            angles = time_scale * t[:, None] * 10000.0 ** (-torch.arange(16, dtype=t.dtype) / 15)
        h = torch.cat([angles.sin(), angles.cos()], dim=1)
        p = self.parts()
        h = F.silu(F.linear(h, p["weight"], p["bias"]))
        p = self.parts()
        return F.linear(h, p["weight"], p["bias"])

    def __call__(self, x: torch.Tensor, t: torch.Tensor, node: dict) -> torch.Tensor:
        """Three levels of two blocks, attention at 4 px, for images of 8 px."""
        e = self.embed(t, node.get("time") == "fourier", node.get("time_scale", 1000.0))
        p = self.parts()
        skips = [F.conv2d(x, p["weight"], p["bias"], padding=1)]
        for side in (8, 4, 2):
            for _ in range(2):
                h = self.block(skips[-1], e)
                skips.append(self.attend(h) if side == 4 else h)
            if side > 2:
                h = self.block(skips[-1], e, 0.5)
                if node.get("progressive_input"):
                    x = h = (self.pyramid(x) + h) / 2**0.5
                skips.append(h)
        h = self.block(self.attend(self.block(skips[-1], e)), e)
        for side in (2, 4, 8):
            for _ in range(3):
                h = self.block(torch.cat([h, skips.pop()], dim=1), e)
            if side == 4:
                h = self.attend(h)
            if side < 8:
                h = self.block(h, e, 2)
        p = self.parts()
        h = F.silu(self.norm(h, p["weight"], p["bias"]))
        p = self.parts()
        return F.conv2d(h, p["weight"], p["bias"], padding=1)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"time_scale": 1.0},
        {"fir": True, "progressive_input": True, "time": "fourier"},
        {"progressive_input": True},
    ],
)
def test_agrees_with_the_network_written_out(fields):
    node = {"name": "ncsnpp", "width": 32, "multipliers": [1, 2, 3], "attention_resolutions": [4], **fields}
    shapes = Shapes(image_size=8, k=2, outputs=1)
    torch.manual_seed(0)
    refiner = REFINERS.build(node, shapes).eval()
    for parameter in refiner.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    u, t = torch.randn(2, 6, 8, 8), torch.tensor([0.004, 0.7])
    plain = Plain({key: value.double() for key, value in refiner.state_dict().items()}, node.get("fir", False))
    with torch.no_grad():
        wanted = plain(u.double(), t.double(), node)
        got = refiner(u, 1000.0 * t, NetworkCondition())
    assert got.shape == (2, 3, 8, 8)
    torch.testing.assert_close(got, wanted.float(), rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_initial_weights():
    torch.manual_seed(0)
    refiner = REFINERS.build({"name": "ncsnpp", "width": 64, "multipliers": [1, 1], "attention_resolutions": [8]},
                             Shapes(image_size=8))  # fmt: skip
    p = {key: value.detach() for key, value in refiner.named_parameters()}
    first = p["all_modules.3.Conv_0.weight"]  # variance 1 / fan_avg
    assert float(first.std()) == pytest.approx((1 / (64 * 9)) ** 0.5, rel=0.03)
    assert float(p["all_modules.4.NIN_0.W"].std()) == pytest.approx((0.1 / 64) ** 0.5, rel=0.05)
    assert not any(p[key].any() for key in p if key.endswith((".Conv_1.weight", ".NIN_3.W", ".bias", ".b")))


def test_classifier_halves_and_is_heard():
    shapes = Shapes(image_size=8, k=2, condition_channels=3, labels=5)
    node = {"name": "ncsnpp_classifier", "width": 32, "multipliers": [1, 2], "attention_resolutions": [4]}
    torch.manual_seed(0)
    classifier = CLASSIFIERS.build(node, shapes).eval()
    for parameter in classifier.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    u, t, given = torch.randn(2, 6, 8, 8), torch.tensor([1.0, 500.0]), NetworkCondition(image=torch.randn(2, 3, 8, 8))
    base = classifier(u, t, given)
    assert base.shape == (2, 5)
    brighter = NetworkCondition(image=given.image + 1)
    for other in (classifier(u + 1, t, given), classifier(u, t + 9, given), classifier(u, t, brighter)):
        assert (other - base).abs().amax(1).min() > 1e-4
    again = CLASSIFIERS.build({**node, "checkpoint_blocks": True}, shapes).eval()
    again.load_state_dict(classifier.state_dict())
    v = u.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(classifier(v, t, given).square().sum(), v)
    (got,) = torch.autograd.grad(again(v, t, given).square().sum(), v)  # as classifier guidance takes it
    assert torch.equal(got, wanted)
    with pytest.raises(ValueError, match=r"condition\.image"):
        classifier(u, t, NetworkCondition())
