"""The terms that an encoder's forward pass returns. `Encoder.forward` describes them."""

from __future__ import annotations

import torch

OUTPUTS = ("z", "x_hat", "features")
"""Terms that are outputs of the network, not losses."""


def encoder_losses(terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the terms that are losses: one number per image, (B,)."""
    return {name: values for name, values in terms.items() if name not in OUTPUTS}
