"""Layers that multiply int8 inputs with int8 weights, with oneDNN's CPU kernels (torch.ops.onednn).

x ~ input_scale * (q - input_zero), with q in -128..127. So x w = input_scale * scale * sum (q - input_zero) * code, and
the sum is exact in 32-bit integers. The range of x changes along a sampling trajectory, so [0, 1000] is divided into
buckets of time, and each bucket has its own input_scale and input_zero.
"""

from __future__ import annotations

import torch
from torch import nn

from dvae.errors import UserError
from dvae.models.quantization.quantized_layers import StorageFormat, StoredLayer, dtype_for

LEAST = -128
STEPS = 255
"""Number of steps between the smallest and the largest code of an activation."""
NEEDED = ("qconv_prepack", "qconv_pointwise", "qlinear_prepack", "qlinear_pointwise")
TIMES = 1000.0
"""Largest t_feature that refiners receive (Refiner.forward)."""


def check_machine() -> None:
    """Raise UserError if this build of PyTorch lacks the oneDNN kernels."""
    lacking = [name for name in NEEDED if not hasattr(torch.ops.onednn, name)]
    if lacking or not torch.backends.mkldnn.is_available():
        raise UserError(
            f"method=int8 needs oneDNN's {lacking[0] if lacking else 'kernels'}, which this PyTorch "
            f"{torch.__version__} is built without: use method=int8_weights"
        )


class TimeBucket:
    """The bucket of time in [0, 1000] of the refiner's current batch.

    `bucket` is 0..buckets - 1, or `buckets` if the times of the batch are in several buckets.
    """

    def __init__(self, buckets: int) -> None:
        self.buckets = self.bucket = buckets

    def observe(self, refiner: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """Set `bucket`. This is a forward pre-hook of the refiner, whose second input is t_feature (B,)."""
        parts = (inputs[1] * (self.buckets / TIMES)).long().clamp(0, self.buckets - 1)
        low, high = int(parts.min()), int(parts.max())
        self.bucket = low if low == high else self.buckets


def affine(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scales, fp32; zeros, int8) of ranges. The codes cover min(low, 0) to max(high, 0), and 0 is exact."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scales = ((high - low) / STEPS).clamp(min=1e-12)
    return scales, ((-low / scales).round().clamp(0, STEPS) + LEAST).to(torch.int8)


def to_int8(x: torch.Tensor, scale: float, zero: int) -> torch.Tensor:
    """Return round(x / scale + zero), clamped to -128..127.

    The rounding error is at most half a step. For x in bf16 it is at most 0.75 steps, because the sum is in bf16 too.
    """
    shift = torch.tensor(zero, dtype=x.dtype, device=x.device)
    return torch.add(shift, x, alpha=1.0 / scale).round_().clamp_(LEAST, LEAST + STEPS).to(torch.int8)


class IntegerLayer(StoredLayer):
    """A quantized nn.Conv2d or nn.Linear that computes in int8. It has no gradients.

    Call `pack_weights` after the weights are loaded and before the first forward pass.
    """

    input_scales: torch.Tensor
    input_zeros: torch.Tensor

    def __init__(self, layer: nn.Conv2d | nn.Linear, time_bucket: TimeBucket) -> None:
        super().__init__(layer, StorageFormat.integer, 0)
        self.time_bucket = time_bucket
        self.register_buffer("input_scales", torch.ones(time_bucket.buckets + 1))
        self.register_buffer("input_zeros", torch.zeros(time_bucket.buckets + 1, dtype=torch.int8))
        self._packed: torch.Tensor | None = None

    def calibrate(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Set the ranges (buckets + 1,) of the input. The last range is for batches with times in several buckets."""
        self.input_scales, self.input_zeros = affine(low, high)

    def pack_weights(self) -> None:
        """Convert the loaded weights to the memory layout of the kernel, and free the codes."""
        assert self.scales is not None
        device = self.codes.device
        self._scales, self._zeros = self.scales.float(), torch.zeros(len(self.scales), dtype=torch.int32, device=device)
        self._inputs = list(zip(self.input_scales.tolist(), self.input_zeros.tolist(), strict=True))
        self._bias = None if self.bias is None else self.bias.float()
        if self.convolution is None:
            self._packed = torch.ops.onednn.qlinear_prepack(self.codes, None)
        else:  # scale 1 and zero 0 of the input are placeholders: every call passes the values of its bucket
            pack = torch.ops.onednn.qconv_prepack
            self._packed = pack(self.codes.contiguous(), self._scales, 1.0, 0, *self.convolution, 1, None)
        self.codes = torch.empty(0, dtype=torch.int8)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weights in the memory layout of the kernel; 0 before `pack_weights`."""
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
        # This kernel takes unsigned inputs 0..255. Flipping the highest bit of an int8 code adds 128. The conversion
        # goes through int8, because PyTorch converts to int8 seven times faster than to uint8.
        q, zero = q.view(torch.uint8).bitwise_xor_(128), zero - LEAST
        return torch.ops.onednn.qconv_pointwise(
            q, scale, zero, self._packed, self._scales, self._zeros, self._bias, *self.convolution, 1, 1.0, 0, dtype,
            "none", [], "",
        )  # fmt: skip
