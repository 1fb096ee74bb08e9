"""Scaled dot-product attention behind one function; the only file that imports xformers."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F

from dvae.errors import UserError

log = logging.getLogger("dvae")

SHORT = 64
"""Longest sequence at which, on a CPU, the formula trains faster than sdpa (2.7 times at 64 in bf16; even at 256)."""

XFORMERS_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class AttentionBackend(Enum):
    """What computes attention."""

    auto = "auto"
    """xformers where it is installed and has an operator for the inputs (CUDA), else sdpa; math where that trains
    faster (short sequences on a CPU)."""
    sdpa = "sdpa"
    """PyTorch's scaled_dot_product_attention."""
    xformers = "xformers"
    """xformers' memory_efficient_attention."""
    math = "math"
    """The formula written out; keeps the (L, L) weights in memory."""


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: AttentionBackend = AttentionBackend.auto
) -> torch.Tensor:
    """softmax(q k' / sqrt(D)) v (Vaswani et al. 2017, eq. 1), per head.

    q (B, L, heads, D), k and v (B, S, heads, D) -> (B, L, heads, D).
    Raises UserError where `backend` is xformers and it cannot be used for these inputs.
    """
    chosen = _choose(q, k, v, backend)
    _say(chosen)
    if chosen is AttentionBackend.xformers:
        return _fmha().memory_efficient_attention(q, k, v)
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    if chosen is AttentionBackend.sdpa:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(q.shape[-1])
    return (torch.softmax(scores, dim=-1).to(v.dtype) @ v).transpose(1, 2)


_planned = False


@contextmanager
def planned_attention() -> Iterator[None]:
    """Within, attention that a GPU computes is sdpa, whatever it would choose.

    For planning, whose tensors are of a GPU that need not exist: xformers would ask that GPU what it can do. Both keep
    the same tensors for the gradient.
    """
    global _planned
    before, _planned = _planned, True
    try:
        yield
    finally:
        _planned = before


def _choose(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: AttentionBackend) -> AttentionBackend:
    if _planned and q.device.type == "cuda" and backend is not AttentionBackend.math:
        return AttentionBackend.sdpa
    if backend in (AttentionBackend.sdpa, AttentionBackend.math):
        return backend
    if backend is AttentionBackend.auto and q.device.type == "cpu" and q.shape[1] <= SHORT and _trained(q, k, v):
        return AttentionBackend.math
    usable = _xformers_supports(q, k, v)
    if backend is AttentionBackend.xformers and not usable:
        why = f"has no operator for {q.dtype} on {q.device.type}" if _installed() else "is not installed"
        raise UserError(f"attention backend xformers {why}: use auto or sdpa")
    return AttentionBackend.xformers if usable else AttentionBackend.sdpa


def _xformers_supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    # no operator computes on CPUs, so xformers is not imported there; its checks fail with KeyError on other dtypes
    if q.device.type != "cuda" or q.dtype not in XFORMERS_DTYPES or not _installed():
        return False
    fmha = _fmha()
    inputs = fmha.Inputs(query=q, key=k, value=v)
    needed = (fmha.ALL_FW_OPS, fmha.ALL_BW_OPS) if _trained(q, k, v) else (fmha.ALL_FW_OPS,)
    return all(any(op.supports(inputs) for op in ops) for ops in needed)


def _trained(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


@functools.cache
def _installed() -> bool:
    """Whether xformers is installed."""
    return importlib.util.find_spec("xformers") is not None


@functools.cache
def _fmha() -> Any:
    """The module xformers.ops.fmha, ready for the operators that call PyTorch's own kernels.

    xformers 0.0.35 is built for PyTorch 2.10 with CUDA 12. Beside another PyTorch its own extension does not load. It
    then prints a warning, and it refuses all CUDA inputs, also for its operators "-pt", which call kernels that PyTorch
    brings. The warning is silenced here, and that refusal is taken back. Operators of the extension stay refused,
    because each operator checks for itself whether its kernel exists (`is_available`).
    """
    logger = logging.getLogger("xformers")
    logger.addFilter(_no_extension_warning)
    try:
        fmha = importlib.import_module("xformers.ops.fmha")
    finally:
        logger.removeFilter(_no_extension_warning)
    common: Any = importlib.import_module("xformers.ops.fmha.common")
    common._built_with_cuda = common._built_with_cuda or torch.version.cuda is not None
    return fmha


def _no_extension_warning(record: logging.LogRecord) -> bool:
    """False for the one warning that xformers' extension does not load."""
    return "can't load C++/CUDA extensions" not in record.getMessage()


@functools.cache
def _say(backend: AttentionBackend) -> None:
    log.info("attention: %s", backend.value)
