"""Convolutions and linear layers with weights in few bits, which are dequantized when they are used."""

from __future__ import annotations

from enum import Enum

import torch
import torch.nn.functional as F
from torch import nn

from dvae.models.quantization import codes


class StorageFormat(Enum):
    """Storage format of the weight of a layer, in memory and in a bundle."""

    bf16 = "bf16"
    """Not quantized, half the bytes of fp32. For sensitive layers."""
    int8 = "int8"
    """One byte per weight, and one scale per output channel."""
    int4 = "int4"
    """Two weights per byte, and one scale per group of inputs."""
    integer = "integer"
    """As int8, but the inputs are int8 too and the product is in integers (quantization/integer_layer.py)."""


def quantizable(layer: nn.Module) -> bool:
    """Return whether a layer can be replaced: nn.Linear, or nn.Conv2d with one group and zero padding."""
    if type(layer) is nn.Linear:
        return True
    plain = type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros"
    return plain and not isinstance(layer.padding, str)


class StoredLayer(nn.Module):
    """A nn.Conv2d or nn.Linear with its weight in a StorageFormat, for inference.

    It passes gradients to its input, but its weight has none. It computes in the dtype of autocast if autocast is on,
    else in the dtype of its input.
    """

    codes: torch.Tensor
    scales: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, layer: nn.Conv2d | nn.Linear, store: StorageFormat, group: int) -> None:
        super().__init__()
        self.store, self.shape = store, layer.weight.shape
        made: tuple[torch.Tensor, torch.Tensor | None] = (layer.weight.detach().to(torch.bfloat16), None)
        if store is StorageFormat.int4:
            made = codes.to_int4(layer.weight, group)
        elif store is not StorageFormat.bf16:
            made = codes.to_int8(layer.weight)
        stored, scales = made
        if stored.ndim == 4:
            stored = stored.contiguous(memory_format=torch.channels_last)
        self.register_buffer("codes", stored)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().to(torch.bfloat16))
        self.convolution: tuple[list[int], list[int], list[int]] | None = None
        """Stride, padding and dilation of a convolution; None for a linear layer."""
        if isinstance(layer, nn.Conv2d):
            self.convolution = list(layer.stride), [int(side) for side in layer.padding], list(layer.dilation)
        else:
            self.in_features, self.out_features = layer.in_features, layer.out_features

    def weight_in(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the dequantized weight in `dtype`. Its quantization error is at most half a step."""
        if self.scales is None:
            return self.codes.to(dtype)
        if self.store is StorageFormat.int4:
            return codes.from_int4(self.codes, self.scales, self.shape, dtype)
        return codes.from_int8(self.codes, self.scales, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = dtype_for(x)
        weight, bias = self.weight_in(dtype), None if self.bias is None else self.bias.to(dtype)
        if self.convolution is None:
            return F.linear(x.to(dtype), weight, bias)
        return F.conv2d(x.to(dtype), weight, bias, *self.convolution)

    def extra_repr(self) -> str:
        return f"{self.store.name}, {tuple(self.shape)}"


def dtype_for(x: torch.Tensor) -> torch.dtype:
    """Return the dtype in which a layer computes for the input x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
