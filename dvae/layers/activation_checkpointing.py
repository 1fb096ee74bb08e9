"""Activation checkpointing: recompute a block in the backward pass instead of storing its activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def maybe_checkpoint(wanted: bool, block: Callable[..., Any], *inputs: Any) -> Any:
    """Return block(*inputs). If `wanted`, store only the inputs for the backward pass (Chen et al. 2016).

    Outputs and gradients are the same, also with dropout. Checkpointing costs about a third more computation.
    """
    if wanted and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
