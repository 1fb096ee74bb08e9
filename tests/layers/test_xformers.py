"""xformers as it is installed: which operator it chooses on a GPU. The CUDA tensors are fake: they have no values."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from tests_support import environment
from torch._subclasses.fake_tensor import FakeTensorMode

from dvae.layers import attention as module
from dvae.layers.attention import AttentionBackend

pytest.importorskip("xformers", reason="xformers is published for Linux on x86-64 only")
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors may be made on "cuda": fake ones, of a GPU of the H100's kind."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    with FakeTensorMode():
        yield


def inputs(length: int, width: int, dtype: torch.dtype, trained: bool) -> list[torch.Tensor]:
    shape = (2, length, 4, width)
    return [torch.empty(shape, dtype=dtype, device="cuda", requires_grad=trained) for _ in range(3)]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("length", "width", "dtype", "operator"),
    [
        (64, 64, BF16, "fa2F"),  # the U-Nets, at resolution 8
        (256, 64, BF16, "fa2F"),  # at 16
        (256, 72, BF16, "fa2F"),  # dit
        (4096, 128, BF16, "fa2F"),
        (256, 256, BF16, "fa2F"),  # one head, as the papers' CIFAR-10 networks have
        (256, 512, BF16, "cutlassF"),  # one head of the autoencoder of latent diffusion
        (256, 64, FP32, "cutlassF"),
        (256, 512, FP32, "cutlassF"),
    ],
)
def test_its_operator_on_a_gpu(
    gpu: None, length: int, width: int, dtype: torch.dtype, operator: str, trained: bool
) -> None:
    q, k, v = inputs(length, width, dtype, trained)
    assert module._choose(q, k, v, AttentionBackend.auto) is AttentionBackend.xformers
    fmha = module._fmha()
    chosen = fmha._dispatch_fw(fmha.Inputs(query=q, key=k, value=v), trained)
    assert chosen.NAME.startswith(operator)
    assert chosen.NAME.endswith("-pt") or torch.__version__.startswith("2.10"), chosen.NAME


def test_without_an_operator_it_is_sdpa(gpu: None) -> None:
    q, k, v = (torch.empty(2, 64, 4, 16, dtype=torch.float64, device="cuda") for _ in range(3))
    assert module._choose(q, k, v, AttentionBackend.auto) is AttentionBackend.sdpa


@pytest.mark.parametrize("backend", [AttentionBackend.auto, AttentionBackend.sdpa, AttentionBackend.xformers])
def test_a_plan_asks_no_gpu(backend: AttentionBackend) -> None:
    with FakeTensorMode(), module.planned_attention():
        q, k, v = inputs(64, 64, BF16, True)
        assert module._choose(q, k, v, backend) is AttentionBackend.sdpa


def test_it_is_imported_for_a_gpu_alone_and_without_its_warning() -> None:
    script = """
import sys, torch
from dvae.layers import attention
q = torch.randn(2, 100, 3, 8)
attention.attention(q, q, q)
assert "xformers" not in sys.modules
attention._fmha()
assert "xformers" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert "WARNING[XFORMERS]" not in done.stderr
