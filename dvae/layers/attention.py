"""Scaled dot-product attention with several backends. This is the only file that imports xformers."""

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
"""Sequence length up to which the formula trains faster than sdpa on a CPU. In bf16 it is 2.7 times as fast at 64, and
equally fast at 256."""

XFORMERS_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that xformers supports."""


class AttentionBackend(Enum):
    """The implementation of attention."""

    auto = "auto"
    """xformers if it is installed and has an operator for the inputs (CUDA only), otherwise sdpa. math for training
    with short sequences on a CPU, because it is faster there."""
    sdpa = "sdpa"
    """PyTorch's scaled_dot_product_attention."""
    xformers = "xformers"
    """xformers' memory_efficient_attention."""
    math = "math"
    """The formula, computed directly. It stores the (L, S) attention weights in memory."""


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: AttentionBackend = AttentionBackend.auto
) -> torch.Tensor:
    """Compute softmax(q k' / sqrt(D)) v for each head (Vaswani et al. 2017, eq. 1).

    Args:
        q: Queries (B, L, heads, D).
        k: Keys (B, S, heads, D).
        v: Values (B, S, heads, D).
        backend: The implementation.

    Returns:
        The result (B, L, heads, D).

    Raises:
        UserError: `backend` is xformers, and xformers is not installed or does not support these inputs.
    """
    chosen = _choose(q, k, v, backend)
    _say(chosen)
    if chosen is AttentionBackend.xformers:
        return _fmha().memory_efficient_attention(q, k, v)
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    if chosen is AttentionBackend.sdpa:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    # The softmax is computed in fp32 or higher, also for half-precision inputs.
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(q.shape[-1])
    return (torch.softmax(scores, dim=-1).to(v.dtype) @ v).transpose(1, 2)


_planned = False


@contextmanager
def planned_attention() -> Iterator[None]:
    """Use sdpa for all attention on CUDA tensors while the block runs, except for the math backend.

    This is for planning, which uses tensors on a GPU that may not exist. xformers would query the capabilities of that
    GPU. sdpa and xformers store the same tensors for the backward pass, so the planned memory is right for both.
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
    # xformers has no operators for CPUs, so it is not imported there. For other dtypes, its checks raise KeyError.
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
    """Return whether xformers is installed."""
    return importlib.util.find_spec("xformers") is not None


@functools.cache
def _fmha() -> Any:
    """Import xformers.ops.fmha, and enable its operators that call PyTorch's kernels.

    xformers 0.0.35 is built for PyTorch 2.10 with CUDA 12. With another PyTorch, its C++ extension does not load. It
    then prints a warning and rejects all CUDA inputs. It even rejects them for its "-pt" operators, whose kernels are
    part of PyTorch.

    This function silences the warning and enables CUDA inputs again. Operators of the extension stay disabled, because
    each operator checks whether its kernel exists (`is_available`).
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
    """Logging filter: return False for the warning that the extension of xformers does not load."""
    return "can't load C++/CUDA extensions" not in record.getMessage()


@functools.cache
def _say(backend: AttentionBackend) -> None:
    log.info("attention: %s", backend.value)
