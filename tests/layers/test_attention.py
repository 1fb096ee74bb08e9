from __future__ import annotations

import logging
import types

import pytest
import torch

from dvae.errors import UserError
from dvae.layers import attention as module
from dvae.layers.attention import AttentionBackend, attention

B, L, S, H, D = 2, 5, 7, 3, 4


@pytest.fixture(autouse=True)
def _fresh_caches():
    module._say.cache_clear()
    module._installed.cache_clear()


def qkv(**kwargs: object) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, n, H, D, **kwargs) for n in (L, S, S)]  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", [AttentionBackend.auto, AttentionBackend.sdpa, AttentionBackend.math])
@pytest.mark.parametrize("trained", [False, True])
def test_is_the_formula_head_by_head(backend, trained):
    q, k, v = qkv(requires_grad=trained)
    got = attention(q, k, v, backend)
    assert got.shape == (B, L, H, D)
    for b in range(B):
        for h in range(H):
            weights = torch.exp(q[b, :, h] @ k[b, :, h].T / D**0.5)
            wanted = (weights / weights.sum(1, keepdim=True)) @ v[b, :, h]
            torch.testing.assert_close(got[b, :, h], wanted, rtol=1e-5, atol=1e-6)


def test_backends_have_the_same_gradients():
    gradients = []
    for backend in (AttentionBackend.sdpa, AttentionBackend.math):
        inputs = qkv(dtype=torch.float64, requires_grad=True)
        attention(*inputs, backend).square().sum().backward()
        gradients.append([a.grad for a in inputs])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_without_xformers_auto_is_sdpa_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO, logger="dvae"):
        attention(*qkv())
        attention(*qkv())
    assert caplog.messages == ["attention: sdpa"]
    with pytest.raises(UserError, match="xformers is not installed: use auto or sdpa"):
        attention(*qkv(), AttentionBackend.xformers)


def fake_fmha(forward: bool, backward: bool) -> types.SimpleNamespace:
    def operators(supported: bool) -> list[types.SimpleNamespace]:
        return [
            types.SimpleNamespace(supports=lambda inputs: False),
            types.SimpleNamespace(supports=lambda _: supported),
        ]

    return types.SimpleNamespace(
        Inputs=lambda query, key, value: (query, key, value),
        ALL_FW_OPS=operators(forward),
        ALL_BW_OPS=operators(backward),
        memory_efficient_attention=lambda q, k, v: "from xformers",
    )


class OnCuda:
    """Stands for a tensor on a GPU: only what the choice looks at."""

    device = torch.device("cuda")
    dtype = torch.bfloat16
    shape = (B, L, H, D)

    def __init__(self, requires_grad: bool = False) -> None:
        self.requires_grad = requires_grad


@pytest.mark.parametrize(
    ("forward", "backward", "trained", "chosen"),
    [
        (True, True, True, AttentionBackend.xformers),
        (True, False, True, AttentionBackend.sdpa),
        (True, False, False, AttentionBackend.xformers),
        (False, True, True, AttentionBackend.sdpa),
    ],
)
def test_auto_asks_xformers_for_an_operator(monkeypatch, forward, backward, trained, chosen):
    monkeypatch.setattr(module, "_installed", lambda: True)
    monkeypatch.setattr(module, "_fmha", lambda: fake_fmha(forward, backward))
    tensors = [OnCuda(trained)] * 3
    assert module._choose(*tensors, AttentionBackend.auto) is chosen  # type: ignore[arg-type]


def test_xformers_is_not_used_on_a_cpu(monkeypatch):
    monkeypatch.setattr(module, "_installed", lambda: True)
    monkeypatch.setattr(module, "_fmha", lambda: fake_fmha(True, True))
    assert isinstance(attention(*qkv()), torch.Tensor)
    with pytest.raises(UserError, match=r"no operator for torch\.float32 on cpu"):
        attention(*qkv(), AttentionBackend.xformers)
    monkeypatch.setattr(module, "_choose", lambda *_: AttentionBackend.xformers)
    assert attention(*qkv()) == "from xformers"
