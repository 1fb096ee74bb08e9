from __future__ import annotations

import pytest
import torch
from torch import nn

from dvae.layers.activation_checkpointing import maybe_checkpoint


class Counted(nn.Module):
    """Linear and dropout, counting its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout, self.calls = nn.Linear(8, 8), nn.Dropout(0.5), 0

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.dropout(torch.tanh(self.linear(x) + y))


@pytest.mark.parametrize("bf16", [False, True])
def test_same_outputs_and_gradients_with_dropout(bf16):
    torch.manual_seed(0)
    block, x = Counted(), torch.randn(4, 8)
    results = []
    for wanted in (False, True):
        y = torch.ones(8, requires_grad=True)
        block.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = maybe_checkpoint(wanted, block, x, y)
        output.float().square().sum().backward()
        results.append([output, y.grad, *(p.grad.clone() for p in block.parameters())])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)
    assert block.calls == 1 + 2


def test_nothing_is_computed_twice_without_a_gradient():
    block = Counted()
    with torch.no_grad():
        maybe_checkpoint(True, block, torch.randn(4, 8), torch.zeros(8))
    assert block.calls == 1


def test_keeps_only_the_inputs():
    def kept(wanted: bool) -> int:
        """Bytes kept for the gradient by ten blocks, without weights."""
        blocks, y = [Counted() for _ in range(10)], torch.zeros(8, requires_grad=True)
        weights = {p.data_ptr() for block in blocks for p in block.parameters()}
        found: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in weights:
                found[tensor.data_ptr()] = tensor.nbytes
            return tensor

        x = torch.randn(64, 8)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            for block in blocks:
                x = maybe_checkpoint(wanted, block, x, y)
        return sum(found.values())

    assert kept(True) < kept(False) / 2
