"""The terms that an encoder's forward pass returns."""

from __future__ import annotations

import torch

OUTPUTS = ("z", "x_hat", "features")
"""Terms that are network outputs and not losses."""


def encoder_losses(terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The terms that are one number (B,) per image."""
    return {name: values for name, values in terms.items() if name not in OUTPUTS}
