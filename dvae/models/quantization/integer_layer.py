"""Layers that multiply int8 by int8, by oneDNN's kernels on a CPU (torch.ops.onednn).

x ~ input_scale * (q - input_zero) with q in -128..127, so that x w = input_scale * scale * sum (q - input_zero) * code,
summed up exactly in 32 bits. Ranges of x change along a trajectory, so there is a scale for each part of the time.
"""

from __future__ import annotations

import torch
from torch import nn

from dvae.errors import UserError
from dvae.models.quantization.quantized_layers import StorageFormat, StoredLayer, dtype_for

LEAST = -128
STEPS = 255
"""Steps of an activation's range."""
NEEDED = ("qconv_prepack", "qconv_pointwise", "qlinear_prepack", "qlinear_pointwise")
TIMES = 1000.0
"""Range of the time that refiners are told (Refiner.forward)."""


def check_machine() -> None:
    """Raise UserError where this PyTorch has no such kernels."""
    lacking = [name for name in NEEDED if not hasattr(torch.ops.onednn, name)]
    if lacking or not torch.backends.mkldnn.is_available():
        raise UserError(
            f"method=int8 needs oneDNN's {lacking[0] if lacking else 'kernels'}, which this PyTorch "
            f"{torch.__version__} is built without: use method=int8_weights"
        )


class TimeBucket:
    """Which part of the time [0, 1000] a refiner works in: 0..buckets - 1, or `buckets` for a batch of several."""

    def __init__(self, buckets: int) -> None:
        self.buckets = self.bucket = buckets

    def observe(self, refiner: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """A forward pre-hook of the refiner, whose second input is t_feature (B,)."""
        parts = (inputs[1] * (self.buckets / TIMES)).long().clamp(0, self.buckets - 1)
        low, high = int(parts.min()), int(parts.max())
        self.bucket = low if low == high else self.buckets


def affine(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scales, fp32; zeros, int8) of ranges: the 256 codes reach from low, or 0, to high, or 0, and 0 is exact."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scales = ((high - low) / STEPS).clamp(min=1e-12)
    return scales, ((-low / scales).round().clamp(0, STEPS) + LEAST).to(torch.int8)


def to_int8(x: torch.Tensor, scale: float, zero: int) -> torch.Tensor:
    """x / scale + zero, rounded, within -128..127: off by half a step, of bf16 x by 0.75, since the sum is bf16 too."""
    shift = torch.tensor(zero, dtype=x.dtype, device=x.device)
    return torch.add(shift, x, alpha=1.0 / scale).round_().clamp_(LEAST, LEAST + STEPS).to(torch.int8)


class IntegerLayer(StoredLayer):
    """A nn.Conv2d or nn.Linear that is computed in int8; see `pack_weights`. It has no gradients."""

    input_scales: torch.Tensor
    input_zeros: torch.Tensor

    def __init__(self, layer: nn.Conv2d | nn.Linear, time_bucket: TimeBucket) -> None:
        super().__init__(layer, StorageFormat.integer, 0)
        self.time_bucket = time_bucket
        self.register_buffer("input_scales", torch.ones(time_bucket.buckets + 1))
        self.register_buffer("input_zeros", torch.zeros(time_bucket.buckets + 1, dtype=torch.int8))
        self._packed: torch.Tensor | None = None

    def calibrate(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Take the ranges (buckets + 1,) of the input; the last is for batches of several times."""
        self.input_scales, self.input_zeros = affine(low, high)

    def pack_weights(self) -> None:
        """Bring the weights into the kernel's own order, after they were loaded; the codes are let go."""
        assert self.scales is not None
        device = self.codes.device
        self._scales, self._zeros = self.scales.float(), torch.zeros(len(self.scales), dtype=torch.int32, device=device)
        self._inputs = list(zip(self.input_scales.tolist(), self.input_zeros.tolist(), strict=True))
        self._bias = None if self.bias is None else self.bias.float()
        if self.convolution is None:
            self._packed = torch.ops.onednn.qlinear_prepack(self.codes, None)
        else:  # scale and zero of the input, here 1 and 0, are told again with every call
            pack = torch.ops.onednn.qconv_prepack
            self._packed = pack(self.codes.contiguous(), self._scales, 1.0, 0, *self.convolution, 1, None)
        self.codes = torch.empty(0, dtype=torch.int8)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weights in the kernel's order."""
        return self.shape.numel() if self._packed is not None else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise UserError("a bundle of method=int8 has no gradients: use the original, or method=int8_weights")
        if self._packed is None:
            raise RuntimeError("an int8 layer is used before pack_weights()")
        dtype = dtype_for(x)
        scale, zero = self._inputs[self.time_bucket.bucket]
        if self.convolution is None:
            q = to_int8(x.to(dtype).contiguous(), scale, zero)
            return torch.ops.onednn.qlinear_pointwise(
                q, scale, zero, self._packed, self._scales, self._zeros, self._bias, 1.0, 0, dtype, "none", [], ""
            )
        q = to_int8(x.to(dtype).contiguous(memory_format=torch.channels_last), scale, zero)
        # this kernel takes 0..255: the same codes with the highest bit flipped (PyTorch converts to int8 seven times
        # faster than to uint8)
        q, zero = q.view(torch.uint8).bitwise_xor_(128), zero - LEAST
        return torch.ops.onednn.qconv_pointwise(
            q, scale, zero, self._packed, self._scales, self._zeros, self._bias, *self.convolution, 1, 1.0, 0, dtype,
            "none", [], "",
        )  # fmt: skip
