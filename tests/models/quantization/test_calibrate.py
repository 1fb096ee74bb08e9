"""Ranges of activations of a chain whose activations are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from dvae.evaluation.quantization import calibrate


class Chain(nn.Module):
    """x -> 2 x -> -x - 1 of the first input; t is only listened to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1, 1), nn.Linear(1, 1)
        with torch.no_grad():
            for layer, weight, bias in ((self.first, 2.0, 0.0), (self.second, -1.0, -1.0)):
                layer.weight.fill_(weight)
                layer.bias.fill_(bias)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


class Drawing:
    """A pipeline that shows its refiner [-1, 3] early, [0, 10] late, and both together once."""

    def __init__(self) -> None:
        denoiser: Any = nn.Module()
        denoiser.refiner = Chain()
        self.models = SimpleNamespace(denoiser=denoiser)

    def generate(self, n: int, seed: int) -> None:
        refiner = self.models.denoiser.refiner
        refiner(torch.tensor([[-1.0], [3.0]]), torch.tensor([900.0, 990.0]))
        refiner(torch.tensor([[0.0], [10.0]]), torch.tensor([10.0, 200.0]))
        refiner(torch.tensor([[-4.0], [1.0]]), torch.tensor([10.0, 990.0]))


def test_ranges_are_those_that_each_part_of_the_time_shows() -> None:
    drawing: Any = Drawing()
    found = calibrate.calibrate_ranges(drawing, ["refiner.first", "refiner.second"], buckets=3, n=2, seed=0)
    # nothing is seen of the middle of the time, so that it has the range of all
    assert found["refiner.first"].low.tolist() == [0.0, -4.0, -1.0, -4.0]
    assert found["refiner.first"].high.tolist() == [10.0, 10.0, 3.0, 10.0]
    assert found["refiner.second"].low.tolist() == [0.0, -8.0, -2.0, -8.0]
    assert found["refiner.second"].high.tolist() == [20.0, 20.0, 6.0, 20.0]
    refiner = drawing.models.denoiser.refiner
    assert not refiner._forward_pre_hooks
    assert not refiner.first._forward_pre_hooks
